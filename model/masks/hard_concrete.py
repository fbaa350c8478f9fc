"""Hard-concrete gates under an L0 penalty, the standard to hold learned dropout beside (docs/model.md D).

"Learning Sparse Neural Networks through L0 Regularization" (Louizos, Welling and Kingma 2018, arXiv:1712.01312).
"""

import math

import torch
from torch import Tensor, nn

from model.attention.visibility import Visible
from model.config.mask_config import Site
from model.config.transformer import TransformerConfig
from model.layers.dropout import noise_site
from model.layers.noise import uniform
from model.masks.site import SiteDropout, Statistics
from model.masks.telemetry import mask_statistics

_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
"""The paper's beta, gamma and zeta (section 4.1)."""
_ZERO = _TEMPERATURE * math.log(-_LOW / _HIGH)


class HardConcreteGates(SiteDropout):
    """x -> x * z, one gate z in [0, 1] for each channel; exactly 0 and exactly 1 have probability mass.

    With s = sigmoid((log u - log(1 - u) + a) / beta): z = clamp(s (zeta - gamma) + gamma, 0, 1) (equations 10 and 11).
    Each sequence draws its own u. In evaluation z = clamp(sigmoid(a) (zeta - gamma) + gamma, 0, 1) (equation 13).
    """

    def __init__(self, config: TransformerConfig, site: Site, layer: int) -> None:
        """`layer` counts from 0 in its stream."""
        super().__init__(config, site, layer)
        start = math.log(config.l0.open_init / (1 - config.l0.open_init)) + _ZERO
        self.log_alpha = nn.Parameter(torch.full((config.width,), start))
        self._noise_site = noise_site(self.name)

    def mask(
        self, x: Tensor, keys: Tensor | None, source: Tensor | None, visible: Visible
    ) -> tuple[Tensor, Statistics]:
        """Gate the channels of x; see `SiteDropout.forward`. The statistic `l0` is penalised."""
        log_alpha = self._log_alpha()
        gates = self._gates(log_alpha, keys)
        z = gates.detach()
        statistics = {"l0": torch.sigmoid(log_alpha - _ZERO).mean()} | mask_statistics(z, z > 0.0)
        return x * gates.to(x.dtype), {self.name: statistics}

    def kept(self, x: Tensor, source: Tensor | None, visible: Visible) -> Tensor:
        """The same channels at every token."""
        return (self._gates(self._log_alpha(), None) > 0.0).expand(x.shape)

    def _log_alpha(self) -> Tensor:
        return self.log_alpha.to(torch.promote_types(self.log_alpha.dtype, torch.float32))

    def _gates(self, log_alpha: Tensor, keys: Tensor | None) -> Tensor:
        """z [B, 1, C], or [1, 1, C] in evaluation."""
        if keys is None:
            stretched = torch.sigmoid(log_alpha)[None, None]
        else:
            u = uniform(keys, self._noise_site, (1, len(log_alpha))).to(log_alpha.dtype) + 2.0**-25  # never 0 nor 1
            stretched = torch.sigmoid((u.log() - (1.0 - u).log() + log_alpha) / _TEMPERATURE)
        return (stretched * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)
