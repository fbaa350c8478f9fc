"""The tokenizer in a dataset's folder: trained once for its text, and never taken for another's."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors, sync_folder, write_atomic, write_json
from data_pipeline.storage.manifest import STREAMS, TokenizerFacts, differences
from data_pipeline.tokenize.tokenizer import TOKENIZER, Tokenizer, model_file, model_name, sentinel, train_tokenizer

META = "meta.json"


def prepare_tokenizer(
    home: Path,
    work: Path,
    config: TokenizerConfig,
    seed: int,
    identity: dict[str, Any],
    texts: Callable[[], Iterable[str]],
) -> Tokenizer:
    """The tokenizer in `home`, made there unless it is there. `identity`: what it depends on; `texts`: to train on.

    Raises DataError if another one is there, or it cannot be trained."""
    folder = home / TOKENIZER
    if folder.exists():
        tokenizer = _load(folder, identity)
        _check_symbols(tokenizer, config, f"{folder}, which --overwrite makes anew")
        return tokenizer
    model = read_model(config.model) if config.model else train_tokenizer(texts(), config, seed)
    tokenizer = Tokenizer(model, config.model or "tokenizer")
    _check_symbols(tokenizer, config, config.model or "the tokenizer that was trained")
    if config.model:
        tokenizer.check_ids(config.model)
    if config.model and len(tokenizer.sentinel_ids) < config.sentinels:
        raise DataError(
            f"{config.model} has {len(tokenizer.sentinel_ids)} pieces {sentinel(0)}, …; "
            f"data.tokenizer.sentinels={config.sentinels} asks for more"
        )
    facts = tokenizer_facts(tokenizer, config).model_dump()
    meta = {"format": STREAMS, **facts, "identity": identity}
    new = work / f"new-{TOKENIZER}"
    with disk_errors(folder):
        if new.exists():  # left by a build that was killed, perhaps with a temporary file in it
            shutil.rmtree(new)
        new.mkdir()
        write_atomic(new / model_name(model), model)
        write_json(new / META, meta)
        new.rename(folder)
        sync_folder(home)
    return tokenizer


def _check_symbols(tokenizer: Tokenizer, config: TokenizerConfig, name: str) -> None:
    default = TokenizerConfig().user_defined_symbols
    if config.model is None or config.user_defined_symbols != default:
        tokenizer.check_symbols(config.user_defined_symbols, name, trained=config.model is None)


def _load(folder: Path, identity: dict[str, Any]) -> Tokenizer:
    ways_on = "choose another data.path, or --overwrite it"
    try:
        meta = json.loads((folder / META).read_bytes())
        trained_for, sha256 = meta["identity"], meta["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} has no usable {META} that says what it was trained on ({error!r}); {ways_on}"
        ) from None
    if changed := differences(trained_for, identity):
        raise DataError(f"{folder} was trained for other data: {'; '.join(changed)}. {ways_on.capitalize()}")
    tokenizer = Tokenizer.of(folder)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{model_file(folder)} is not the model that {META} beside it describes; {ways_on}")
    return tokenizer


def read_model(path: str) -> bytes:
    """The model that is to be taken as it is. Raises DataError if there is none."""
    place = Path(path).expanduser()
    try:
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise DataError(
                f"data.tokenizer.model={path} is no file, and a model is read several times: write it to one"
            )
        return place.read_bytes()
    except OSError as error:
        raise DataError(f"data.tokenizer.model={path} cannot be read: {error.strerror}") from None


def tokenizer_identity(config: TokenizerConfig) -> dict[str, Any]:
    """What a tokenizer depends on beside its text. Settings that came later are in it when they are not what they were
    before they could be set. Raises DataError if the model cannot be read."""
    if config.model:
        return {"model (sha256)": hashlib.sha256(read_model(config.model)).hexdigest()}
    first = {"type", "vocab_size", "character_coverage", "user_defined_symbols", "sample_bytes"}
    return {**config.model_dump(include=first), **config.model_dump(exclude=first, exclude_defaults=True)}


def tokenizer_facts(tokenizer: Tokenizer, config: TokenizerConfig) -> TokenizerFacts:
    """What the manifest says of a tokenizer."""
    return TokenizerFacts(
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        type=Path(config.model).name if config.model else config.type,
        eos_id=tokenizer.eos_id,
        unk_id=tokenizer.unk_id,
        sentinels=tokenizer.sentinel_ids,
    )
