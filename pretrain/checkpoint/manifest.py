"""The manifest of a checkpoint, which makes a folder one: what it holds, where. Free of torch: it is looked at, too."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from data_pipeline.errors import CheckpointError
from data_pipeline.files.sealed import seal
from model.architectures.names import current_name, former_name
from pretrain.run.checkpoint_folder import FORMAT, MANIFEST, OLDEST_FORMAT, UNSEALED_FORMATS, check_file, read_manifest

BUFFER = "buffer/"
"""Before the name of the first shard's tensors that hold the model's buffers."""
LAST_WITHOUT_BACKBONE = 3
_ADAM_STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What each parameter has in the oldest format, which had AdamW only."""
NAMED = ("shapes", "states", "buffers")
"""Fields of a manifest that are by the name of a parameter or buffer."""


class CheckpointShard(BaseModel, extra="forbid", frozen=True):
    """One rank's file and the fragments in it, in order: (parameter, start, numel)."""

    file: str
    bytes: int
    xxh3_128: str
    fragments: list[tuple[str, int, int]]


class CheckpointManifest(BaseModel, extra="forbid", frozen=True):
    """What makes a directory a checkpoint."""

    format: int = FORMAT
    step: int
    optimizer_steps: int
    """Updates AdamW has applied; less than `step` by the skipped ones."""
    world_size: int
    zero_stage: int
    shapes: dict[str, list[int]]
    states: dict[str, tuple[str, ...]]
    """What each parameter is made of: fp32, and what its optimizer keeps."""
    buffers: dict[str, list[int]] = {}
    """Shapes of the model's buffers."""
    shards: list[CheckpointShard]
    state: dict[str, Any]
    """Everything that is not a tensor: data position, fingerprint, tokenizer, configuration, attempt, commit."""
    validation_loss: float | None = None
    """Of this very step, in nats a token, when there was a validation."""
    saved: float | None = None
    """Seconds since the epoch, at the copy."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_states(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("format") == OLDEST_FORMAT and isinstance(raw.get("shapes"), dict):
            return raw | {"states": dict.fromkeys(raw["shapes"], _ADAM_STATES)}
        return raw

    @model_validator(mode="after")
    def _name_as_today(self) -> "CheckpointManifest":
        """Until format 3 an architecture's parameters were the model's own, without `backbone.` before their names."""
        if self.format > LAST_WITHOUT_BACKBONE:
            return self
        named = {field: {current_name(name): value for name, value in getattr(self, field).items()} for field in NAMED}
        shards = [
            shard.model_copy(update={"fragments": [(current_name(name), *place) for name, *place in shard.fragments]})
            for shard in self.shards
        ]
        for field, value in {**named, "shards": shards}.items():
            object.__setattr__(self, field, value)
        return self

    def stored_name(self, buffer: str) -> str:
        """What a buffer is called in the first shard."""
        return BUFFER + (former_name(buffer) if self.format <= LAST_WITHOUT_BACKBONE else buffer)

    @classmethod
    def load(cls, path: Path) -> "CheckpointManifest":
        """Of a checkpoint's folder: compared with its own hash, and every shard is there in its full size.

        Raises:
            CheckpointError: names the file that is missing, unreadable, altered or of the wrong size.
        """
        raw = read_manifest(path)
        try:
            found = cls.model_validate(raw)
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"]))
            raise CheckpointError(f"{path / MANIFEST}: damaged: {place}: {wrong['msg']}") from None
        for problem in _problems(found):
            raise CheckpointError(f"{path / MANIFEST}: damaged: {problem}")
        for shard in found.shards:
            size = check_file(path / shard.file)
            if size != shard.bytes:
                raise CheckpointError(
                    f"{path / shard.file}: {size} bytes, the manifest says {shard.bytes}: truncated or altered"
                )
        return found

    def sealed(self) -> str:
        """As it stands on disk, with its own hash; on one line, for of thousands of ranks at ZeRO 3 most of it were
        spaces."""
        return seal(self.model_dump_json())


def _problems(manifest: CheckpointManifest) -> Iterator[str]:
    """In what it does not agree with itself: all that can be checked of older ones, which have no hash."""
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


def _odd_values(manifest: CheckpointManifest) -> Iterator[str]:
    if not 0 <= manifest.optimizer_steps <= manifest.step:
        yield f"optimizer_steps {manifest.optimizer_steps} at step {manifest.step}"
    if manifest.zero_stage not in range(4):
        yield f"zero_stage {manifest.zero_stage}"
    texts = (("tokenizer", str), ("chat_template", str))
    for key, kind in (("data", dict), ("config", dict), ("types", dict), *texts, ("attempt", int)):
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
