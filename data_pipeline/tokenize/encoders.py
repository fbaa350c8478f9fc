"""The two kinds of tokenizer files: SentencePiece's .model and Hugging Face's tokenizer.json."""

import os
from functools import cached_property
from typing import Any

import numpy as np
import sentencepiece

from data_pipeline.errors import DataError
from data_pipeline.tokenize.bpe_words import WordEncoder

SPACE_MARK = "\u2581"
"""SentencePiece's stand-in for a space. In text it would come back as a space, so it never reaches the model."""
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")


class SentencePieceEncoder:
    """A .model file."""

    def __init__(self, model: bytes, name: str) -> None:
        """Raises DataError if it is unfit."""
        try:
            if not model:  # The library takes it for no model at all, and says nothing.
                raise ValueError("an empty file")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._processor.id_to_piece(list(range(self._processor.vocab_size())))
        except (RuntimeError, ValueError) as error:  # The latter also for pieces, or messages, that are not UTF-8.
            raise DataError(
                f"{name} is not a SentencePiece model (nor a tokenizer.json): it is damaged, cut off, or another file; "
                "name the right one, or fetch it again"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{name} has no end-of-text piece </s>; train one with `duet data tokenizer`")
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._space_mark = np.array([self.unk_id] if self.unk_id in mark else mark, np.int32)

    def encode(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens]."""
        encoded = self._encode(texts, num_threads)
        for index, text in enumerate(texts):
            if SPACE_MARK in text:
                parts = self._encode(text.split(SPACE_MARK), num_threads)
                joined = [array for part in parts for array in (self._space_mark, part)]
                encoded[index] = np.concatenate(joined[1:])
        return encoded

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the first character of each token and the one behind its last."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                ids += self._space_mark.tolist()
                offsets += [(start - 1, start)] * len(self._space_mark)
            found = self._processor.encode_as_offset_mapping(part)
            ids += found["ids"]
            offsets += [(start + begin, start + end) for begin, end in found["offsets"]]
            start += len(part) + 1
        return ids, offsets

    @cached_property
    def _words(self) -> WordEncoder | None:
        return WordEncoder.of(self._processor)

    def _encode(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        if self._words is not None:
            return self._words.encode(texts, num_threads)
        return self._processor.encode(texts, return_type="numpy", num_threads=num_threads)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return self._processor.decode(ids)

    def piece(self, token: int) -> str:
        """The piece `token`."""
        return self._processor.id_to_piece(token)

    def token(self, piece: str) -> int | None:
        """The token of `piece`, if there is one."""
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None

    def special_ids(self) -> list[int]:
        """Tokens that no text gives."""
        return [token for token in range(self.vocab_size) if self._processor.is_control(token)]

    def is_byte(self, token: int) -> bool:
        """Whether `token` spells a byte."""
        return self._processor.is_byte(token)


class HuggingFaceEncoder:
    """A tokenizer.json file."""

    def __init__(self, model: bytes, name: str) -> None:
        """Raises DataError if it is unfit, or the library is missing."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise DataError(
                f"{name} is a Hugging Face tokenizer, which needs the library tokenizers: "
                "pip install 'duet-pretrain[tokenizers]'"
            ) from None
        try:
            self._tokenizer: Any = Tokenizer.from_str(model.decode())
        except Exception as error:  # The library raises no narrower class.
            raise DataError(f"{name} is not a tokenizer.json of Hugging Face's library tokenizers: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token does not give it.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.unk_id: int = -1 if unknown is None else self.token(unknown) or 0
        ends = [token for piece in _ENDS if (token := self.token(piece)) is not None]
        if not ends:
            raise DataError(f"{name} has no end-of-text piece; it must have one of {', '.join(_ENDS)}")
        self.eos_id: int = ends[0]

    def encode(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens]."""
        # The library reads it at each call; it knows only all CPUs or one.
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(item.ids, np.int32) for item in encoded]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the first character of each token and the one behind its last."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """The piece `token`."""
        return self._tokenizer.id_to_token(token)

    def token(self, piece: str) -> int | None:
        """The token of `piece`, if there is one."""
        return self._tokenizer.token_to_id(piece)

    def special_ids(self) -> list[int]:
        """Tokens that no text gives."""
        return [token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special]

    def is_byte(self, token: int) -> bool:
        """Whether `token` spells a byte."""
        piece = self.piece(token)
        return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
