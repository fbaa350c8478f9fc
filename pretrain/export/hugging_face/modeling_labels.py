"""Duet's models of labels for transformers: of texts, of their tokens, and where answers stand. As `modeling_duet`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from model.batch import IGNORE
from pretrain.export.hugging_face.modeling_duet import DuetPreTrainedModel, check_positions, layers_recorded, mean_loss


class _Labels(DuetPreTrainedModel):
    """What the three share."""

    def _said(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        output_hidden_states: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """What `LabelModel.predict` gives, and the states of the layers if they are wanted."""
        if position_ids is not None:
            check_positions(position_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        with layers_recorded(self.model.backbone, output_hidden_states) as states:
            logits = self.model.predict(input_ids, None, self._batch(input_ids, attention_mask))
        return logits, tuple(states) if output_hidden_states else None


class DuetForSequenceClassification(_Labels):
    """A model that says a label of a text."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits [B, labels] of input_ids [B, T]; labels [B] int64. Hidden states are as the layers give them."""
        logits, states = self._said(input_ids, attention_mask, position_ids, output_hidden_states)
        logits = logits[:, 0]
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels.flatten())
        found = SequenceClassifierOutput(loss, logits, hidden_states=states)
        return found if return_dict else found.to_tuple()


class DuetForTokenClassification(_Labels):
    """A model that says a label of each token."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits [B, T, labels] of input_ids [B, T]; labels [B, T] int64, -100 for none."""
        logits, states = self._said(input_ids, attention_mask, position_ids, output_hidden_states)
        found = TokenClassifierOutput(mean_loss(logits, labels), logits, hidden_states=states)
        return found if return_dict else found.to_tuple()


class DuetForQuestionAnswering(_Labels):
    """A model that says where in a text the answer to a question stands. A row is question, end-of-text, text."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Logits [B, T] of the answer's first and last token in input_ids [B, T]; positions [B] int64, -100 for none.

        Those of padding are the lowest there are.
        """
        logits, states = self._said(input_ids, attention_mask, position_ids, output_hidden_states)
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask.bool()[..., None], torch.finfo(logits.dtype).min)
        loss = None
        if start_positions is not None and end_positions is not None:
            places = torch.stack([start_positions.flatten(), end_positions.flatten()], dim=1)
            loss = functional.cross_entropy(logits.float(), places, ignore_index=IGNORE)
        start, end = logits.unbind(-1)
        found = QuestionAnsweringModelOutput(loss, start, end, hidden_states=states)
        return found if return_dict else found.to_tuple()
