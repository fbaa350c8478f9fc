"""Scores without queries and keys: "Synthesizer: Rethinking Self-Attention", arXiv:2005.00743, section 3."""

import torch
from torch import Tensor, nn

from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.scores_config import Synthesized, factors
from model.config.transformer import TransformerConfig
from model.layers.layers import INIT_STD


class Synthesizer(Softmax):
    """Softmax over scores that a key's position gives, with the query's token, its position, or q k^T in a mixture.

    A key counts by its position alone, unless `dot` is among the parts, so a cache keeps values only. Queries come as
    one vector of d channels for each part that has one, side by side in each head.

        dense               row p_k of W relu(x)
        factorised_dense    the same of the products of two shorter rows
        random              row p_q, column p_k of a table
        factorised_random   the same of the product of two narrow tables
        mixture             sum of softmax(w)_i times part i, w of each head
    """

    counts = True

    def __init__(self, config: TransformerConfig, name: str) -> None:
        """Tables for `context` positions; those of maps start at N(0, 0.02), others at 1 in the scores."""
        super().__init__(config, name, config.attention_rate, formed=True)
        scores, heads, rows = config.scores, config.heads, config.context
        self.parts = scores.parts
        self._rows = rows
        self._width = config.width // heads
        if "dense" in self.parts:
            self.dense = _table(config.width, rows, INIT_STD)
        if "factorised_dense" in self.parts:
            self.first, self.second = (_table(config.width, size, INIT_STD) for size in factors(rows))
        if "random" in self.parts:
            table = _table(heads * rows, rows, 1.0)
            if scores.trainable:
                self.table = table
            else:
                self.register_buffer("table", table.data)
        if "factorised_random" in self.parts:
            self.left, self.right = (_table(heads * rows, scores.rank, scores.rank**-0.25) for _ in range(2))
        if len(self.parts) > 1:
            self.mixture = nn.Parameter(torch.zeros(heads * len(self.parts)))

    def _scores(self, query: Tensor, key: Tensor, visible: Visible) -> Tensor:
        vectors = iter(query.split(self._width, dim=-1))
        at = visible.positions, visible.positions if visible.key_positions is None else visible.key_positions
        each = []
        for part in self.parts:
            if part == "dot":
                each.append(next(vectors) @ key.transpose(2, 3) * self._width**-0.5)
            elif part in ("random", "factorised_random"):
                each.append(self._by_place(part, query.shape[2], at))
            else:
                each.append(_columns(self._of_token(part, next(vectors).relu()), query.shape[2], at[1]))
        each = [part.expand(len(query), -1, -1, -1) for part in each]
        if len(each) == 1:
            return each[0]
        shares = self.mixture.view(-1, len(each)).softmax(-1).to(query.dtype)
        return torch.stack([shares[:, n, None, None] * part for n, part in enumerate(each)]).sum(0)

    def _of_token(self, part: Synthesized, hidden: Tensor) -> Tensor:
        """A row of scores for each token, of its hidden [B, H, T, d] -> [B, H, T, N]."""
        if part == "dense":
            return self._by_head(hidden, self.dense)
        first, second = (self._by_head(hidden, table) for table in (self.first, self.second))
        return (first[..., None] * second[..., None, :]).flatten(-2)

    def _by_place(self, part: Synthesized, length: int, at: "Places") -> Tensor:
        """[B, H, T, S], or [1, H, T, T] where every row has its tokens in their places."""
        queries, keys = (None if places is None else places.clamp(min=0) for places in at)
        if part == "random":
            table = self.table.view(-1, self._rows, self._rows)
            if queries is None or keys is None:
                return table[None, :, :length, :length]
            return table[:, queries[:, :, None], keys[:, None, :]].transpose(0, 1)
        left, right = (table.view(-1, self._rows, table.shape[-1]) for table in (self.left, self.right))
        if queries is None or keys is None:
            return (left[:, :length] @ right[:, :length].transpose(1, 2))[None]
        return (left[:, queries] @ right[:, keys].transpose(2, 3)).transpose(0, 1)

    def _by_head(self, hidden: Tensor, table: Tensor) -> Tensor:
        """[B, H, T, d], by the rows [C, n] of each head -> [B, H, T, n]; no copy of the table for each of B."""
        return torch.einsum("bhtd,hdn->bhtn", hidden, table.view(-1, self._width, table.shape[-1]))


Places = tuple[Tensor | None, Tensor | None]
"""Of queries [B, T] and keys [B, S]; None where they are those of the columns."""


def _columns(rows: Tensor, length: int, keys: Tensor | None) -> Tensor:
    """Of rows of scores [B, H, T, N], those of the keys: [B, H, T, S]."""
    if keys is None:
        return rows[..., :length]
    places = keys.clamp(min=0)[:, None, None]
    return rows.gather(3, places.expand(len(rows), rows.shape[1], rows.shape[2], -1))


def _table(rows: int, columns: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).normal_(std=std))
