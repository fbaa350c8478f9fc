"""Texts as vectors: the mean over a text's tokens of what the model makes of each."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.files.formats import kind
from data_pipeline.ingest.readers import ReadCounts, read_jsonl
from model.architectures.backbone import one_stream
from model.architectures.token_model import TokenModel
from model.attention.visibility import visible_both_ways
from pretrain.inference.trained import Trained


def vectors(
    trained: Trained,
    texts: Sequence[str],
    batch: int,
    *,
    normalised: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> np.ndarray:
    """A vector of each text, float32 [N, C]: the mean over its tokens of what the head reads, or, of a model that reads
    one sequence and writes another, of its encoder's output.

    A text longer than the context is read in parts of it. Parts of one length are computed together, so there is no
    padding, and no text has a say in another's vector.

    Args:
        trained: its model goes to the GPU if there is one.
        batch: parts of a forward pass.
        normalised: divided by their lengths.
        progress: told before each pass how many parts are done, and of how many.

    Raises:
        DataError: a text has no tokens.
        ConfigError: the model has no stream to take vectors from.
    """
    model = trained.model.to("cuda" if torch.cuda.is_available() else "cpu")
    context = model.config.context
    encoded = [torch.from_numpy(ids.astype(np.int64)) for ids in trained.tokenizer.encode(list(texts))]
    for number, ids in enumerate(encoded, 1):
        if not len(ids):
            raise DataError(f"text {number} is empty: there is nothing to make a vector of")
    parts = [(number, part) for number, ids in enumerate(encoded) for part in ids.split(context)]
    parts.sort(key=lambda part: -len(part[1]))  # the longest pass comes first, and shows whether memory is enough
    sums = torch.zeros(len(encoded), model.config.width, dtype=torch.float64)
    done = 0
    while done < len(parts):
        progress(done, len(parts))
        together = [part for part in parts[done : done + batch] if len(part[1]) == len(parts[done][1])]
        ids = torch.stack([part for _, part in together]).to(next(model.parameters()).device)
        numbers = torch.tensor([number for number, _ in together])
        sums.index_add_(0, numbers, _states(model, ids).double().sum(1).cpu())
        done += len(together)
    found = sums / torch.tensor([[len(ids)] for ids in encoded])
    if normalised:
        found = nn.functional.normalize(found, dim=-1)
    return found.float().numpy()


@torch.inference_mode()
def _states(model: TokenModel, ids: Tensor) -> Tensor:
    """Of each token of ids [B, T], [B, T, C]."""
    if not model.config.traits.two_sequences:
        return model.hidden(ids, None).x
    encoder = getattr(model.backbone, "encoder", None)
    if not isinstance(encoder, nn.ModuleList):
        raise ConfigError(f"{model.config.architecture} reads one sequence and writes another, and has no `encoder`")
    visible = visible_both_ways(ids.shape, ids.device, model.config)
    return one_stream(encoder, model.embed(ids, None, visible, model.embed_dropout), None)[0]


def read_texts(path: Path, text_key: str) -> list[str]:
    """A text on each line, or, of JSON Lines, under `text_key` of each object. So many vectors there will be.

    Raises:
        ConfigError: no such file, not UTF-8, a table, or nothing in it.
        DataError: a line holds no text.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give one with a text on each line, or JSON Lines")
    if kind(str(path)) == "jsonl":
        found = [
            (document.number, "".join(document.chunks(ReadCounts())))
            for document in read_jsonl(str(path), text_key, "strict", ReadCounts())
        ]
    elif kind(str(path)) == "plain":
        try:
            lines = path.read_text(encoding="utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
        found = [*enumerate(lines.split("\n"), 1)] if lines else []
    else:
        raise ConfigError(f"{path}: texts are read from lines or from JSON Lines; write the table as such")
    for number, text in found:
        if not text:
            raise DataError(f"{path}, line {number}: no text; leave the line out")
    if not found:
        raise ConfigError(f"{path}: no text in it; write one on each line")
    return [text for _, text in found]
