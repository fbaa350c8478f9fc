"""How scores become weights where it is not a softmax; the weights are formed, since no kernel has these."""

import torch
from torch import Tensor, nn

from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.transformer import TransformerConfig
from model.layers.entmax import SMALLEST, entmax


def mixer_of(config: TransformerConfig, heads: int, name: str) -> Softmax:
    """What an attention of a stream mixes its values with, as the configuration says; `name` keys its noise."""
    if config.weights.kind == "entmax":
        return Entmax(config, heads, name)
    return Softmax(config, name, config.attention_rate)


class Entmax(Softmax):
    """alpha-entmax in the place of the softmax: "Adaptively Sparse Transformers", arXiv:1909.00015, section 3.

    Tells of each head in training: `alpha`, and `zeros`, the share of the visible keys that get a weight of 0.
    """

    def __init__(self, config: TransformerConfig, heads: int, name: str) -> None:
        """alpha = 1 + sigmoid(a), a of each head from 0 on, unless the configuration gives one."""
        super().__init__(config, name, config.attention_rate, formed=True)
        self._fixed = config.weights.alpha
        if config.weights.learned:
            self.alpha_logit = nn.Parameter(torch.zeros(heads))

    def _normalised(self, scores: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self._fixed is not None:
            alpha: Tensor | float = self._fixed
        else:
            alpha = (1.0 + self.alpha_logit.to(scores.dtype).sigmoid()).clamp(min=SMALLEST).view(-1, 1, 1)
        weights = entmax(scores, alpha)
        if keys is not None:
            seen = scores.detach() > -torch.inf
            zeros = ((weights.detach() == 0) & seen).float().sum((0, 2, 3)) / seen.sum((0, 2, 3))
            learned = {"alpha": alpha.detach().flatten()} if isinstance(alpha, Tensor) else {}
            self._tell(zeros=zeros, **learned)
        return weights
