"""From the logits of the next token to a token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The steps come in the order of the fields, each on what the one before leaves."""

    repetition_penalty: float = 1.0
    """Positive logits of tokens that the text holds already are divided by it, negative ones multiplied
    ("CTRL", Keskar et al. 2019, arXiv:1909.05858, section 4.1, with the sign minded); 1 changes nothing."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token, and what follows means nothing."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only (Fan et al. 2018, arXiv:1805.04833); those as likely as the k-th stay."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability (Holtzman et al. 2019, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        for key, fits, wanted in (
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "a factor above 0"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a number of tokens, 1 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "a probability above 0, up to 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "a share from 0 to 1"),
        ):
            if not fits:
                raise ConfigError(f"{key}={getattr(self, key)}; it is {wanted}")

    @property
    def penalises(self) -> bool:
        """Which tokens a text holds already makes a difference."""
        return self.repetition_penalty != 1.0

    def draw(self, logits: Tensor, present: Tensor | None, generators: Sequence[torch.Generator | None]) -> Tensor:
        """One token for each text.

        Args:
            logits: [B, V].
            present: [B, V] bool, tokens that each text holds; None unless it `penalises`.
            generators: B of them, on the logits' device, so that no text's draws depend on the others; None is
                torch's own.

        Returns:
            [B] int64.
        """
        if self.temperature == 0.0:
            return self.likeliest(logits, present)
        rows = zip(self.probabilities(logits, present), generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])

    def likeliest(self, logits: Tensor, present: Tensor | None) -> Tensor:
        """What temperature 0 takes: logits [B, V] and present [B, V] bool or None -> [B] int64."""
        return self._penalised(logits, present).argmax(dim=-1)

    def probabilities(self, logits: Tensor, present: Tensor | None) -> Tensor:
        """What is drawn from, at a temperature above 0: logits [B, V] and present [B, V] bool or None -> [B, V]."""
        logits = self._penalised(logits, present)
        # The largest is 0 first: a small temperature would make it infinite.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[..., -1:], -torch.inf)
        if self.top_p < 1.0:
            likeliest, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
            enough = likeliest.cumsum(-1) - likeliest >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(enough).scatter(-1, order, enough), -torch.inf)
        probabilities = logits.softmax(-1)
        least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        return probabilities / probabilities.sum(-1, keepdim=True)

    def _penalised(self, logits: Tensor, present: Tensor | None) -> Tensor:
        logits = logits.float()
        if present is None:
            return logits
        factor = torch.where(logits > 0, 1.0 / self.repetition_penalty, self.repetition_penalty)
        return torch.where(present, logits * factor, logits)
