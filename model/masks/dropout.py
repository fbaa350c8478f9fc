"""Ordinary dropout, with noise that is a function of the sample and the place in the model (model/layers/noise.py)."""

import zlib

from torch import Tensor, nn

from model.attention.visibility import CAUSAL, Visible
from model.config.mask_config import Site
from model.config.model_config import ModelConfig
from model.layers.noise import uniform

Statistics = dict[str, dict[str, Tensor]]
"""By mask, for example `enc_ff/00`: site and layer; then by name, 0-d float32."""


def noise_site(name: str) -> int:
    """The number of a place in the model: the same whatever other places draw."""
    return zlib.crc32(name.encode())


def dropout(x: Tensor, keys: Tensor | None, site: int, rate: float) -> Tensor:
    """Set each element of x [B, T, C] to 0 with probability `rate`, the others grow by 1 / (1 - rate).

    "Dropout: a simple way to prevent neural networks from overfitting" (Srivastava et al. 2014), in training only:

    Args:
        keys: [B] int64, which key the noise; None asks for evaluation, which changes nothing.
    """
    if keys is None or not rate:
        return x
    kept = uniform(keys, site, (x.shape[1], x.shape[2])) >= rate
    return x * (kept.to(x.dtype) / (1.0 - rate))


def weight_dropout(weights: Tensor, keys: Tensor, site: int, rate: float, context: int) -> Tensor:
    """The same for attention weights [B, H, T, T]; a shorter sequence meets the same noise, up to T = `context`."""
    _, heads, queries, width = weights.shape
    noise = uniform(keys, site, (queries, heads * context)).unflatten(-1, (heads, context))[..., :width]
    return weights * ((noise.transpose(1, 2) >= rate).to(weights.dtype) / (1.0 - rate))


class SiteDropout(nn.Module):
    """What an update passes before it is added to the stream: a mask where a kind of it has one, then dropout."""

    def __init__(self, config: ModelConfig, site: Site, layer: int) -> None:
        """`layer` counts from 0 in its stream."""
        super().__init__()
        self.name = f"{site}/{layer:02d}"
        self._rate = config.dropout
        self._dropout_site = noise_site(f"dropout/{self.name}")

    def forward(
        self, x: Tensor, keys: Tensor | None, source: Tensor | None = None, visible: Visible = CAUSAL
    ) -> tuple[Tensor, Statistics]:
        """Mask and drop out x [B, T, C].

        Args:
            keys: [B] int64, which key the noise of training; None asks for evaluation.
            source: [B, T, C], what all masks come from where they do not come from x.
            visible: to the attention that a mask is computed by.

        Returns:
            x, and the statistics of the mask if there is one.
        """
        x, statistics = self.mask(x, keys, source, visible)
        return dropout(x, keys, self._dropout_site, self._rate), statistics

    def mask(
        self, x: Tensor, keys: Tensor | None, source: Tensor | None, visible: Visible
    ) -> tuple[Tensor, Statistics]:
        """x as it is: no mask stands here."""
        return x, {}

    def kept(self, x: Tensor, source: Tensor | None, visible: Visible) -> Tensor | None:
        """Which elements of x pass the mask in evaluation, [B, T, C] bool; None where there is no mask."""
        return None
