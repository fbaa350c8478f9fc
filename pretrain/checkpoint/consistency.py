"""In what a manifest must agree with itself: all that can be checked of older ones, which have no hash."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pretrain.run.checkpoint_folder import UNSEALED_FORMATS

if TYPE_CHECKING:
    from pretrain.checkpoint.manifest import CheckpointManifest


def problems(manifest: "CheckpointManifest") -> Iterator[str]:
    """What is wrong with it."""
    if manifest.format in UNSEALED_FORMATS:
        yield from _odd_values(manifest)
    files = [shard.file for shard in manifest.shards]
    if files != [f"shard-{rank:05d}.safetensors" for rank in range(manifest.world_size)]:
        yield f"the shards of {manifest.world_size} rank(s) are not {', '.join(files) or 'none'}"
    if manifest.states.keys() != manifest.shapes.keys():
        yield f"states and shapes name different parameters: {_first(manifest.states.keys() ^ manifest.shapes.keys())}"
    held: dict[str, list[tuple[int, int]]] = {}
    for shard in manifest.shards:
        for name, start, numel in shard.fragments:
            held.setdefault(name, []).append((start, numel))
    if unknown := held.keys() - manifest.shapes.keys():
        yield f"a fragment of {_first(unknown)}, which is no parameter"
    for name, shape in manifest.shapes.items():
        end = 0
        for start, numel in sorted(held.get(name, [])):
            if start != end:
                break
            end += numel
        if end != math.prod(shape):
            yield f"incomplete: {name} is not covered from element {end}"


def _odd_values(manifest: "CheckpointManifest") -> Iterator[str]:
    if not 0 <= manifest.optimizer_steps <= manifest.step:
        yield f"optimizer_steps {manifest.optimizer_steps} at step {manifest.step}"
    if manifest.zero_stage not in range(4):
        yield f"zero_stage {manifest.zero_stage}"
    for key, kind in (("data", dict), ("config", dict), ("types", dict), ("tokenizer", str), ("attempt", int)):
        if not isinstance(manifest.state.get(key, kind()), kind):
            yield f"state.{key} is {manifest.state[key]!r:.80}"
            return
    data, config = manifest.state.get("data"), manifest.state.get("config")
    if data and config:
        yield from _odd_position(manifest.step, data, config)


def _odd_position(step: int, data: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """Every step reads a batch; after a rollback, steps are fewer by whole batches."""
    try:
        tokens = config["batch"]["tokens"]
        samples = tokens // config["model"]["context"]
        read, read_tokens = data["samples_seen"], data["tokens_seen"]
        more = read - step * samples
        fits = more >= 0 and more % samples == 0 and read_tokens * samples == read * tokens
    except (KeyError, TypeError, ZeroDivisionError) as error:
        yield f"where the data stood cannot be told: {error!r}"
        return
    if not fits:
        yield (
            f"{read} samples and {read_tokens} tokens were read by step {step}, in batches of {samples} samples and "
            f"{tokens} tokens: that does not fit"
        )


def _first(names: Any) -> str:
    return min(names)
