"""What may change in the configuration of a run: each key says for itself, and a key that is not named here may not.

NAME stands for the name of a source.
"""

import re
from collections.abc import Iterable
from typing import Any

from model.architectures.external import is_external
from pretrain.config.schema import ARCHITECTURE, Config, differences

PLACES = ("run.dir", "data.path", "data.cache", "data.cache_bytes")
"""Where things lie. What lies there must be the same: the dataset's fingerprint is checked."""
BUILD = (
    *("data.sources", "data.sources.NAME.paths", "data.sources.NAME.text_key", "data.sources.NAME.target_key"),
    *("data.sources.NAME.filter.min_chars", "data.sources.NAME.filter.max_chars"),
    *("data.sources.NAME.filter.language", "data.sources.NAME.filter.language_key"),
    "data.sources.NAME.filter.function",
    *("data.tokenizer.type", "data.tokenizer.vocab_size", "data.tokenizer.character_coverage"),
    *("data.tokenizer.user_defined_symbols", "data.tokenizer.sentinels", "data.tokenizer.model"),
    "data.tokenizer.sample_bytes",
    *("data.split.rule", "data.split.fraction", "data.split.files", "data.split.text_key", "data.split.target_key"),
    *("data.duplicates.rule", "data.duplicates.threshold", "data.duplicates.words", "data.duplicates.permutations"),
    *("data.shuffle", "data.errors", "data.seed", "data.shard_tokens"),
)
"""What a dataset is built from. Training reads the dataset alone, whose fingerprint is checked."""
PHASE = (
    *("data.weights", "data.weights.NAME", "data.sources.NAME.weight", "data.sources.NAME.repeat"),
    *("data.order", "data.packing", "data.exhausted", "data.phase"),
)
"""What is read from here on. `DataState.entered` refuses a change unless `data.phase` begins a new phase."""
COMPUTED = (
    "batch.micro_batch",
    *("engine.zero_stage", "engine.offload", "engine.hpz_partition_size", "engine.activation_checkpointing"),
    *("engine.compile", "engine.timeout_minutes"),
)
"""How the same is computed: but for the order in which sums are taken, nothing else is learned."""
WATCHED = (
    *("health.max_skipped", "health.on_spike", "health.spike_z", "health.spike_window"),
    *("health.rollback_checkpoints", "health.max_rollbacks", "health.gc_every", "health.hang_minutes"),
    *("tracking.mode", "tracking.uri", "tracking.experiment", "profile.steps"),
    *("train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every"),
    "train.sample_tokens",
)
"""How the run is watched, and what it does when it breaks: a run that has diverged goes on with these."""
ON_RESUME = (*PLACES, *BUILD, *PHASE, *COMPUTED, *WATCHED)
"""`train.steps` may change, too, while the learning rate has not depended on it (`RunFolder`)."""
IN_FORK = (
    *ON_RESUME,
    *("run.name", "run.start_from", "data.objective", "data.mask_boundaries", "engine.precision"),
    *("optimizer.lr", "optimizer.mask_lr", "optimizer.muon_lr", "train.steps", "train.tokens"),
    *("schedule.kind", "schedule.warmup_steps", "schedule.cooldown", "schedule.cooldown_shape", "schedule.final_lr"),
)
"""In what a run may differ from the one whose checkpoint it begins with."""


def refused(old: Config, new: Config, allowed: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """The keys that differ and are not among the allowed, with both values."""
    pattern = re.compile("|".join(re.escape(key).replace("NAME", ".+") for key in allowed))
    return {key: values for key, values in differences(old, new).items() if not pattern.fullmatch(key)}


def refused_in_fork(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which a run may not differ from the one whose checkpoint it begins with.

    Another source of its architecture it may have: whether the weights fit is seen when they are read.
    """
    found = refused(old, new, IN_FORK)
    if all(is_external(name) for name in found.get(ARCHITECTURE, [])):
        found.pop(ARCHITECTURE, None)
    return found


def told(changed: dict[str, tuple[Any, Any]]) -> str:
    """A line for each key of which a run has another value than now."""
    return "\n".join(f"  {key}: {old!r} in the run, {new!r} now" for key, (old, new) in changed.items())
