"""Ways to write a target with two decoders (`draft_and_verify`): what one drafts the other may verify, or not.

Each gives tokens as soon as they are certain. `verify` gives what `ar` does: token for token where the likeliest is
taken, and else with the same probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.architectures.draft_and_verify.spec import DraftAndVerifyConfig
from model.generation.target import Asking, Steps, Target
from model.generation.texts import Drawn


@dataclass(frozen=True)
class Drafting:
    """How a target is written."""

    decode: str = "verify"
    """One of `WAYS`, as the architecture's traits name them."""
    iterations: int = 10
    """Passes of `mask_predict`."""
    candidates: int = 1
    """Lengths that `nar` and `mask_predict` try; the other decoder says which target is the likeliest."""

    def check(self, config: DraftAndVerifyConfig) -> None:
        """Raises ConfigError unless it is a way of this model."""
        if self.decode not in config.traits.decodings:
            raise ConfigError(
                f"decode={self.decode}: {config.architecture} writes by {', '.join(config.traits.decodings)}"
            )
        for key, value in (("iterations", self.iterations), ("candidates", self.candidates)):
            if value < 1:
                raise ConfigError(f"{key}={value}; it is 1 or more")
        if config.draft.refine and self.decode in ("verify", "ar"):
            raise ConfigError(
                f"decode={self.decode}: the model has draft.refine=true, so its decoder reads the draft's vectors, and "
                "what it would write without them it has not learned; take refine, nar or mask_predict"
            )
        if not config.draft.refine and self.decode == "refine":
            raise ConfigError("decode=refine is for a model that was trained with draft.refine=true; take verify")
        if self.candidates > 1 and (config.draft.refine or self.decode not in ("nar", "mask_predict")):
            raise ConfigError(
                f"candidates={self.candidates}: lengths are tried by nar and mask_predict, and judged by a decoder "
                "that does not read the draft (draft.refine=false); leave candidates out"
            )


def token_by_token(target: Target, drafting: Drafting) -> Steps:
    """A pass for each token."""
    while not target.ended:
        logits, present = (yield from target.following()), target.present()
        if target.sampling.temperature:
            token = target.draw(target.probabilities(logits, present)[0])
        else:
            [token] = target.likeliest(logits, present)
        yield target.add([token], logits)


def verify(target: Target, drafting: Drafting) -> Steps:
    """Draft what is left, judge all of it in one pass, keep what agrees and one token more; again from there.

    The likeliest tokens: blockwise parallel decoding (Stern et al. 2018, arXiv:1811.03115). Sampled: a draft x that was
    drawn from q stays with probability min(1, p(x) / q(x)), else its place is drawn from (p - q)+, and nothing behind
    it stays (Leviathan et al. 2023, arXiv:2211.17192). A draft's tokens are drawn each from its place's own q.
    """
    take = _sampled if target.sampling.temperature else _likeliest
    while not target.ended:
        length = target.length(more_than=len(target.done))
        logits, _ = yield from target.draft(target.done, length)
        drawn = yield from take(target, logits)
        yield drawn


def _likeliest(target: Target, drafted: Tensor) -> Asking[Drawn]:
    draft = _up_to_the_end(target, target.likeliest(drafted, target.present()))
    logits = yield from target.following(draft)
    wanted = target.likeliest(logits, target.present(draft[: len(logits) - 1]))
    pairs = zip(draft, wanted, strict=False)
    agree = next((place for place, (own, its) in enumerate(pairs) if own != its), len(draft))
    return target.add([*draft[:agree], *wanted[agree : agree + 1]], logits, draft)


def _sampled(target: Target, drafted: Tensor) -> Asking[Drawn]:
    q = target.probabilities(drafted, target.present())
    draft = _up_to_the_end(target, [target.draw(row) for row in q])
    logits = yield from target.following(draft)
    p = target.probabilities(logits, target.present(draft[: len(logits) - 1]))
    tokens: list[int] = []
    for place, token in enumerate(draft):
        stays = min(1.0, float(p[place, token] / q[place, token]))
        if stays < 1.0 and target.draw(torch.tensor([stays, 1.0 - stays], device=target.device)):
            left = (p[place] - q[place]).clamp(min=0.0)
            return target.add([*tokens, target.draw(left / left.sum())], logits, draft)
        tokens.append(token)
    if len(logits) > len(draft):
        tokens.append(target.draw(p[len(draft)]))
    return target.add(tokens, logits, draft)


def at_once(target: Target, drafting: Drafting) -> Steps:
    """One pass for all places (Gu et al. 2018, arXiv:1711.02281)."""
    return mask_predict(target, Drafting("nar", 1, drafting.candidates))


def mask_predict(target: Target, drafting: Drafting) -> Steps:
    """All places, of which the least certain are hidden and filled in again, in `iterations` passes.

    Pass t of K leaves L (K - t) / K of L places hidden (Ghazvininejad et al. 2019, arXiv:1904.09324, section 3). Where
    tokens are drawn, those once shown stay: hidden again, they would be drawn as if the others had not been.

    With several lengths the target that the other decoder finds likeliest is taken (noisy parallel decoding, Gu et al.
    2018, section 4.2).
    """
    best: tuple[float, list[int], Tensor] | None = None
    for length in target.lengths(drafting.candidates):
        tokens, logits = yield from _filled(target, length, drafting.iterations)
        judged = 0.0 if drafting.candidates == 1 else (yield from _judged(target, tokens))
        if best is None or judged > best[0]:
            best = judged, tokens, logits
    assert best is not None
    yield target.add(best[1], best[2], best[1])


def _filled(target: Target, length: int, iterations: int) -> Asking[tuple[list[int], Tensor]]:
    """Tokens of a target of that length, and the logits [length, V] of the passes that each is of."""
    ids = torch.zeros(length, dtype=torch.int64, device=target.device)
    hidden = torch.ones(length, dtype=torch.bool, device=target.device)
    certain = torch.zeros(length, device=target.device)
    present, samples = target.present(), target.sampling.temperature > 0
    logits = torch.zeros(length, target.model.config.vocab_size or 0, device=target.device)
    for t in range(1, min(iterations, length) + 1):
        found, _ = yield from target.fill(ids, hidden)
        logits = torch.where(hidden[:, None], found, logits)
        if samples:
            probabilities = target.probabilities(found, present)
            tokens = torch.tensor([target.draw(row) for row in probabilities], device=target.device)
        else:
            probabilities = found.float().softmax(-1)
            tokens = target.sampling.likeliest(found, present)
        of_tokens = probabilities.gather(-1, tokens[:, None])[:, 0].float()
        ids = torch.where(hidden, tokens, ids)
        certain = torch.where(hidden, of_tokens, certain)
        left = length * (min(iterations, length) - t) // min(iterations, length)
        ranked = certain if not samples else certain.masked_fill(~hidden, torch.inf)
        hidden = torch.zeros_like(hidden).scatter(0, ranked.topk(left, largest=False).indices, True)
    return ids.tolist(), logits


def _judged(target: Target, tokens: list[int]) -> Asking[float]:
    """Log-probability of a whole target, its end included, under the other decoder; a prefix would be likelier."""
    ids = _up_to_the_end(target, tokens)
    if ids[-1] != target.eos_id and len(ids) < target.capacity:
        ids = [*ids, target.eos_id]
    logits = yield from target.following(ids[:-1])
    found = logits.float().log_softmax(-1).gather(-1, torch.tensor(ids, device=target.device)[:, None])
    return float(found.sum())


def refine(target: Target, drafting: Drafting) -> Steps:
    """A draft in one pass, then token by token with its vectors in view (Xia et al. 2017, deliberation networks)."""
    _, vectors = yield from target.draft([], target.length())
    yield from target.consider(vectors)
    yield from token_by_token(target, drafting)


def _up_to_the_end(target: Target, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(target.eos_id) + 1] if target.eos_id in tokens else tokens


WAYS: dict[str, Callable[[Target, Drafting], Steps]] = {
    "verify": verify,
    "ar": token_by_token,
    "nar": at_once,
    "mask_predict": mask_predict,
    "refine": refine,
}
"""By name: how a target is written."""
