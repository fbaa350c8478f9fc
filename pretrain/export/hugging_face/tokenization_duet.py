"""Duet's tokenizer for transformers, where no tokenizer.json gives the same ids.

Exports hold this file and, in files beside it, what it imports. A `spm.model` needs sentencepiece.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from data_pipeline.tokenize.encoders import HuggingFaceEncoder, SentencePieceEncoder


class DuetTokenizer(PreTrainedTokenizer):
    """The tokenizer of the training: no text gives a special token, and nothing is added to it."""

    vocab_files_names = {"vocab_file": "spm.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any) -> None:
        """One of the two kinds of files."""
        self._file = Path(vocab_file or tokenizer_file or "")
        kind = SentencePieceEncoder if vocab_file else HuggingFaceEncoder
        self._duet: SentencePieceEncoder | HuggingFaceEncoder = kind(self._file.read_bytes(), str(self._file))
        self._ids = {self._duet.piece(token): token for token in range(self._duet.vocab_size)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Pieces."""
        return self._duet.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Ids by piece."""
        return dict(self._ids)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The pieces of a text."""
        return [self._duet.piece(token) for token in self._duet.encode([text], 1)[0].tolist()]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._duet.unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._duet.piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return self._duet.decode([self._ids[token] for token in tokens])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the tokenizer's file."""
        file = Path(save_directory) / "-".join(filter(None, (filename_prefix, self._file.name)))
        if file != self._file:
            shutil.copyfile(self._file, file)
        return (str(file),)
