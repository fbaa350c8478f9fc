"""A site of dropout: what an update passes before it is added to the stream."""

from torch import Tensor, nn

from model.attention.visibility import CAUSAL, Visible
from model.config.mask_config import Site
from model.config.model_config import ModelConfig
from model.layers.dropout import dropout, noise_site

Statistics = dict[str, dict[str, Tensor]]
"""By mask, for example `enc_ff/00`: site and layer; then by name, 0-d float32."""


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
        return dropout(x, keys, self._dropout_site, self._rate, visible.first), statistics

    def mask(
        self, x: Tensor, keys: Tensor | None, source: Tensor | None, visible: Visible
    ) -> tuple[Tensor, Statistics]:
        """x as it is: no mask stands here."""
        return x, {}

    def kept(self, x: Tensor, source: Tensor | None, visible: Visible) -> Tensor | None:
        """Which elements of x pass the mask in evaluation, [B, T, C] bool; None where there is no mask."""
        return None
