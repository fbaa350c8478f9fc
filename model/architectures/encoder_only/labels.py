"""An encoder that says labels in the place of tokens (Devlin et al. 2019, arXiv:1810.04805, section 4)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from model.architectures.backbone import Backbone
from model.architectures.token_model import TokenModel
from model.batch import IGNORE, Batch
from model.config.head_config import HeadConfig
from model.config.model_config import ModelConfig
from model.layers.chunked_loss import TokenLoss
from model.layers.layers import TiedEmbedding

HEAD = "head."
"""What the names of its own parameters begin with; no other of a model's parameters has such a name."""


class LabelModel(TokenModel):
    """Labels [B, L] of a batch: L = 1 of a text; L = T of its tokens; L = 2, first and last token of an answer."""

    def __init__(self, config: ModelConfig, backbone: Callable[[], Backbone], head: HeadConfig) -> None:
        """A row [C] for each label, in the place of those of the tokens."""
        super().__init__(config, backbone)
        self.kind = head.kind
        self.head = TiedEmbedding(head.outputs, config.width)

    def predict(self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None = None) -> Tensor:
        """Logits of input_ids [B, T]: [B, 1, labels] of a text, [B, T, labels] of tokens, [B, T, 2] of where an answer
        begins and ends."""
        return self.head(self._read_by_head(self.hidden(input_ids, keys, batch).x, batch))

    def token_loss(self, x: Tensor, inputs: Batch) -> TokenLoss:
        """See `TokenModel.token_loss`; in evaluation with what is likeliest."""
        read = self._read_by_head(x, inputs)
        if self.kind == "span":
            return _of_places(self.head(read), inputs)
        found = self.head(read, inputs.labels, *self.loss_weights(inputs))
        return found if torch.is_grad_enabled() else found._replace(chosen=self.head(read).argmax(-1))

    def _read_by_head(self, x: Tensor, batch: Batch | None) -> Tensor:
        """Of x [B, T, C] the mean over what is no padding, [B, 1, C], where a label is of all of a text."""
        if self.kind != "sequence":
            return x
        if batch is None or batch.padding is None:
            return x.mean(1, keepdim=True)
        holds = (~batch.padding).to(x.dtype)
        shares = holds / holds.sum(1, keepdim=True).clamp(min=1)
        return shares[:, None] @ x


def best_places(logits: Tensor, allowed: Tensor) -> Tensor:
    """First and last place of the likeliest answer, [B, 2] int64, by logits [B, T, 2] of where one begins and ends.

    Args:
        allowed: [B, T] bool, where it may stand; somewhere in each row.
    """
    begins, ends = logits.float().masked_fill(~allowed[..., None], -torch.inf).unbind(-1)
    begins, first = begins.cummax(1)  # up to each place, where an answer that ends there may begin
    last = (begins + ends).argmax(1, keepdim=True)
    return torch.cat([first.gather(1, last), last], dim=1)


def _of_places(logits: Tensor, inputs: Batch) -> TokenLoss:
    """The loss of labels [B, 2], first and last place of an answer, by logits [B, T, 2] of each place."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    padding = torch.zeros_like(inputs.input_ids, dtype=torch.bool) if inputs.padding is None else inputs.padding
    scores = logits.to(exact).masked_fill(padding[..., None], torch.finfo(exact).min)
    by_place = functional.cross_entropy(scores, inputs.labels, ignore_index=IGNORE, reduction="none")
    count = inputs.num_labels().clamp(min=1) if inputs.counts is None else inputs.counts.labels
    loss = by_place.sum() / count
    told = TokenLoss(loss, loss.detach(), torch.zeros_like(loss))
    if torch.is_grad_enabled():
        return told
    allowed = ~padding | padding.all(1, keepdim=True)  # a row that counts for nothing
    return told._replace(by_token=by_place, chosen=best_places(logits, allowed))
