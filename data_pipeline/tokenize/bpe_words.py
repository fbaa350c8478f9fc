"""Byte-pair encoding word by word: a word is encoded when it is first met, and looked up from then on."""

import itertools
import re
from typing import Any

import numpy as np
import sentencepiece

_LETTERS = "a-zA-Z\u00c0-\u1fff"
_RULES = (
    re.compile(rf"\n+| *[{_LETTERS}]+| *[^ \n{_LETTERS}]+| +"),
    re.compile(r"\n+| *[^ \n]+| +"),
)
"""What counts as a word: letters or other characters with the spaces before them, where no piece of the vocabulary has
both; else all up to the next space. Newlines are apart. Whether text is cut between two characters depends on these
two alone."""
_SPACE = "\u2581"
_MAX_WORDS = 2**18
_MAX_TOKENS = 2**21
"""How much is remembered: some 50 MB."""


class WordEncoder:
    """Gives the ids of whole texts from those of their words. Make one with `of`, which knows where they are equal."""

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, rule: re.Pattern[str], prefix: str = ""
    ) -> None:
        """`rule` finds the words; `prefix` goes before each text that is not empty."""
        self._processor = processor
        self._rule = rule
        self._prefix = prefix
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}
        self._starts: np.ndarray = np.empty(0, np.int64)
        self._lengths: np.ndarray = np.empty(0, np.int64)
        self._ids: np.ndarray = np.empty(0, np.int32)

    @classmethod
    def of(cls, processor: sentencepiece.SentencePieceProcessor) -> "WordEncoder | None":
        """The encoder of a model whose words can be encoded one by one, else None.

        Merging gives pieces of the vocabulary only. If no piece reaches over a place where text is cut, the merges on
        its two sides never meet, and those of a side come in the same order (by score, then from the left) with the
        other side or without it. Beside that the model must be byte-pair encoding (a unigram model sums up rounded
        scores from the text's beginning), leave text as it is (but for a space it may put in front), and fall back to
        bytes (else unknown characters are joined over a cut).
        """
        from sentencepiece import sentencepiece_model_pb2  # Takes 50 ms, which only encoding needs.

        model: Any = sentencepiece_model_pb2
        proto = model.ModelProto.FromString(processor.serialized_model_proto())
        trained, normalizer = proto.trainer_spec, proto.normalizer_spec
        if (
            trained.model_type != trained.BPE
            or not trained.byte_fallback
            or trained.treat_whitespace_as_suffix
            or normalizer.precompiled_charsmap
            or normalizer.remove_extra_whitespaces
            or not normalizer.escape_whitespaces
        ):
            return None
        kinds = model.ModelProto.SentencePiece
        of_text = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
        pieces = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces if piece.type in of_text]
        for rule in _RULES:
            if all(rule.fullmatch(piece) for piece in pieces):
                if not normalizer.add_dummy_prefix:
                    return cls(processor, rule)
                normalizer.add_dummy_prefix = False
                return cls(sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()), rule, " ")
        return None

    def encode(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens]; no text may hold SentencePiece's own mark of a space."""
        words: list[str] = []
        ends = [0]
        for text in texts:
            words += self._rule.findall(self._prefix + text if text else text)
            ends.append(len(words))
        if len(self._numbers) > _MAX_WORDS or len(self._ids) > _MAX_TOKENS:
            self._forget()
        if new := list(set(words) - self._numbers.keys()):
            self._learn(new, num_threads)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        lengths = self._lengths[numbers]
        behind = np.cumsum(lengths)
        # Where in `_ids` each token is: a word's first place, and on from there.
        ids = self._ids[np.repeat(self._starts[numbers] - behind + lengths, lengths) + np.arange(lengths.sum())]
        bounds = np.concatenate([[0], behind])[ends].tolist()
        return [ids[begin:end] for begin, end in itertools.pairwise(bounds)]

    def _learn(self, words: list[str], num_threads: int) -> None:
        # Lists, since to wrap a few numbers as an array takes longer than to encode them.
        encoded = self._processor.encode(words, return_type=int, num_threads=num_threads)
        lengths = np.concatenate([self._lengths, np.fromiter(map(len, encoded), np.int64, len(encoded))])
        self._starts, self._lengths = np.cumsum(lengths) - lengths, lengths
        ids = itertools.chain.from_iterable(encoded)
        self._ids = np.concatenate([self._ids, np.fromiter(ids, np.int32, int(lengths.sum()) - len(self._ids))])
        self._numbers.update(zip(words, itertools.count(len(self._numbers))))
