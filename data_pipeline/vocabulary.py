"""The tokenizer in a dataset's folder: trained once for its text, and never taken for another's."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_pipeline.atomic import disk_errors, sync_folder, write_atomic, write_json
from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.manifest import FORMAT, TokenizerFacts, differences
from data_pipeline.tokenizer import MODEL, TOKENIZER, Tokenizer, train_tokenizer

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
        return _load(folder, identity)
    model = train_tokenizer(texts(), config, seed)
    tokenizer = Tokenizer(model)
    facts = tokenizer_facts(tokenizer, config.type).model_dump()
    meta = {"format": FORMAT, **facts, "identity": identity}
    new = work / f"new-{TOKENIZER}"
    with disk_errors(folder):
        new.mkdir(exist_ok=True)
        write_atomic(new / MODEL, model)
        write_json(new / META, meta)
        new.rename(folder)
        sync_folder(home)
    return tokenizer


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
        raise DataError(f"{folder / MODEL} is not the model that {META} beside it describes; {ways_on}")
    return tokenizer


def tokenizer_facts(tokenizer: Tokenizer, model_type: str) -> TokenizerFacts:
    """What the manifest says of a tokenizer."""
    return TokenizerFacts(
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        type=model_type,
        eos_id=tokenizer.eos_id,
        unk_id=tokenizer.unk_id,
    )
