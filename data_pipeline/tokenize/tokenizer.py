"""Tokenizers: SentencePiece trained on a bounded sample, or a model from elsewhere."""

import functools
import hashlib
import heapq
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import xxhash

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest.sources import cut
from data_pipeline.tokenize.encoders import SPACE_MARK, HuggingFaceEncoder, SentencePieceEncoder

TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a dataset's folder."""
MODEL, JSON = "spm.model", "tokenizer.json"
UNK_ID = 0
EOS_ID = 1
_UNKNOWN_MARK = "\u2585"
"""SentencePiece's trainer silently skips a sentence that holds it, and takes NUL for a bad encoding."""
_RESERVED = re.compile(f"[\0{SPACE_MARK}{_UNKNOWN_MARK}]+")
_THREADS = 16  # A constant: the trainer's floating-point sums depend on it.


class Segment(NamedTuple):
    """2 to 4 KiB of text, cut at newlines where there are some."""

    rank: int
    """Pseudorandom, from its place and a seed: the lowest are in the sample."""
    place: int
    text: str


class Reservoir:
    """A uniform sample of text in one pass and bounded memory: at most `limit` UTF-8 bytes of segments, in order."""

    def __init__(self, limit: int, seed: int, unit: int = 0) -> None:
        """`unit`: number of the unit of work that the text comes from."""
        self._limit = limit
        self._seed = seed
        self._next = unit << 40
        self._size = 0
        self._kept: list[tuple[int, int, str]] = []

    def add_text(self, text: str) -> None:
        """Considers the segments of `text`, which follows what was added before."""
        for piece in cut([text], after=2**11, limit=2**12):
            rank = xxhash.xxh3_64_intdigest(self._next.to_bytes(8, "little"), seed=self._seed)
            self.add(Segment(rank, self._next, piece.text))
            self._next += 1

    def add(self, segment: Segment) -> None:
        """Considers a segment of another reservoir of the same seed."""
        heapq.heappush(self._kept, (-segment.rank, segment.place, segment.text))
        self._size += len(segment.text.encode())
        while self._size > self._limit:
            self._size -= len(heapq.heappop(self._kept)[2].encode())

    def segments(self) -> list[Segment]:
        """The sample, in the order of the text."""
        return sorted((Segment(-rank, place, text) for rank, place, text in self._kept), key=lambda item: item.place)


def sample(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """At most `limit` UTF-8 bytes of `texts`, as a Reservoir takes them."""
    reservoir = Reservoir(limit, seed)
    for text in texts:
        reservoir.add_text(text)
    return [segment.text for segment in reservoir.segments()]


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, seed: int) -> bytes:
    """Trains on a sample of `texts`; returns the model file. The same texts, config and seed give the same bytes.

    Raises DataError when the text cannot support `vocab_size`, or `vocab_size` is too small for its characters.
    """
    segments = [part for text in sample(texts, config.sample_bytes, seed) for part in _RESERVED.split(text) if part]
    if not segments:
        raise DataError("there is no text to train a tokenizer on: every document of the training split is empty")
    if config.type == "char":
        model = _train(
            segments, config, len(set().union(*segments)) + 2 + len(config.user_defined_symbols) + config.sentinels
        )
        needed = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
        if needed > config.vocab_size:
            raise DataError(
                f"data.tokenizer.vocab_size={config.vocab_size} is too small for the characters of the text: set it "
                f"to at least {needed}, or lower data.tokenizer.character_coverage"
            )
        return model
    return _train(segments, config, config.vocab_size)


def _train(segments: list[str], config: TokenizerConfig, vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(segments),
            model_writer=model,
            model_type=config.type,
            vocab_size=vocab_size,
            character_coverage=config.character_coverage,
            # Text is seen with its spaces marked, and a symbol is sought in what is seen.
            user_defined_symbols=[symbol.replace(" ", SPACE_MARK) for symbol in config.user_defined_symbols],
            # Control symbols: text that spells one does not give it.
            control_symbols=[sentinel(number) for number in range(config.sentinels)],
            byte_fallback=config.type != "char",
            # Text goes in and comes out as it is.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # Longer sentences would be skipped; ours are 4 KiB at most.
            max_sentence_length=2**20,
            unk_id=UNK_ID,
            eos_id=EOS_ID,
            bos_id=-1,
            pad_id=-1,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), config)) from error
    return model.getvalue()


def _explain(message: str, config: TokenizerConfig) -> str:
    asked = f"data.tokenizer.vocab_size={config.vocab_size}"
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        return f"{asked} is more than this text supports: set it to at most {match[1]}"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"{asked} is too small for the characters of the text (with 256 byte pieces, special pieces and "
            f"user_defined_symbols): set it above {match[1]}, or lower data.tokenizer.character_coverage"
        )
    return f"SentencePiece cannot train with data.tokenizer {config.model_dump()}: {message}"


def sentinel(number: int) -> str:
    """The piece that stands for the `number`-th span that was cut out (Raffel et al., 2020, T5)."""
    return f"<extra_id_{number}>"


class Tokenizer:
    """A trained model. `decode(encode(text)) == text` for one that was trained here, unless its type is `char` and a
    character is unknown; others may normalise."""

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """`model`: the bytes of a SentencePiece model or a tokenizer.json; `name`: what errors call it.

        Raises DataError if it is unfit."""
        kind = HuggingFaceEncoder if model.lstrip()[:1] == b"{" else SentencePieceEncoder
        self._encoder: HuggingFaceEncoder | SentencePieceEncoder = kind(model, name)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._encoder.vocab_size
        self.unk_id = self._encoder.unk_id
        self.eos_id = self._encoder.eos_id
        found = map(self._encoder.token, map(sentinel, itertools.count()))
        self.sentinel_ids = [token for token in itertools.takewhile(lambda token: token is not None, found) if token]
        """Tokens that no text gives: for span corruption."""

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """Pieces that no text gives, even where it spells them, and their tokens."""
        return {piece: token for token in self._encoder.special_ids() if (piece := self.piece(token))}

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Reads a model file; one that was read lately is shared. Raises DataError if it is missing or no tokenizer."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"no tokenizer at {path}: {error.strerror}; `duet data tokenizer` trains one") from None
        return _loaded(model, str(path))

    @staticmethod
    def of(folder: Path) -> "Tokenizer":
        """The tokenizer in a dataset's `tokenizer` folder. Raises DataError if there is none."""
        return Tokenizer.load(model_file(folder))

    def encode(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens], without EOS. The number of threads makes no difference to them."""
        return self._encoder.encode(texts, num_threads)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids as `encode` gives them, and which characters of `text` the tokens are of, where they begin and end, int64
        [tokens, 2], both ascending; of the bytes that spell a character together, each is of it."""
        ids, offsets = self._encoder.encode_with_offsets(text)
        found = np.array(offsets, np.int64).reshape(-1, 2)
        found[:, 1] = np.maximum(found[:, 1], np.minimum(found[:, 0] + 1, len(text)))
        return np.array(ids, np.int32), found

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; EOS and sentinels have none, an unknown character reads ' \u2047 ', cut-off bytes
        U+FFFD."""
        return self._encoder.decode(np.asarray(ids).tolist())

    def piece(self, token: int) -> str:
        """The piece `token` as the model spells it."""
        return self._encoder.piece(token)

    def check_ids(self, name: str) -> None:
        """Raises DataError unless the tokens of the file called `name` are 0 ... vocab_size - 1."""
        for token in range(self.vocab_size):
            if self.piece(token) is None:  # a tokenizer.json may have gaps
                raise DataError(
                    f"{name} has {self.vocab_size} pieces, and none of them has the id {token}, so some id is beyond "
                    "the vocabulary: fill the gap with a piece that no text gives"
                )

    def check_symbols(self, symbols: Sequence[str], name: str, trained: bool) -> None:
        """Raises DataError unless each of `symbols` is one piece; as which text gives it if it was `trained`."""
        texts = [symbol.replace(SPACE_MARK, " ") for symbol in symbols]
        for symbol, text, ids in zip(symbols, texts, self.encode(texts), strict=True):
            matched = len(ids) == 1 and ids[0] != self.unk_id and self.decode(ids) == text
            if not matched and (trained or self._encoder.token(symbol) is None):
                raise DataError(
                    f"data.tokenizer.user_defined_symbols: {symbol!r} is no piece of {name}; leave it out, or "
                    + ("write it otherwise" if trained else "take a model that has it")
                )

    def is_byte(self, token: int) -> bool:
        """Whether `token` is one of the 256 pieces that spell characters outside the vocabulary."""
        return self._encoder.is_byte(token)


@functools.lru_cache(maxsize=2)
def _loaded(model: bytes, name: str) -> Tokenizer:
    return Tokenizer(model, name)


def model_file(folder: Path) -> Path:
    """Where the model is in a dataset's `tokenizer` folder."""
    return next((folder / name for name in (MODEL, JSON) if (folder / name).exists()), folder / MODEL)


def model_name(model: bytes) -> str:
    """What a model's file is called."""
    return JSON if model.lstrip()[:1] == b"{" else MODEL
