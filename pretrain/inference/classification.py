"""Labels of texts, of what is in them, or answers to questions about them, by a model that learned them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.files.formats import kind
from data_pipeline.ingest.readers import Labelled, ReadCounts, read_jsonl, text_of
from model.architectures.encoder_only.labels import LabelModel, best_places
from model.batch import Batch
from pretrain.inference.embedding import read_texts
from pretrain.inference.trained import Trained
from pretrain.status_line import harmless

_SHOWN = 60
"""Characters of a text on a terminal."""


class Asked(NamedTuple):
    """A text, and a question where one is answered."""

    text: str
    question: str = ""


class _Row(NamedTuple):
    """What is read at once."""

    number: int
    """Of what was asked."""
    ids: Tensor
    """[n] int64."""
    before: int
    """So many of them are the question's."""
    first: int
    """Number, in the text, of the first token behind them."""


class Classifier:
    """A trained model with a head of labels."""

    def __init__(self, trained: Trained) -> None:
        """Its model goes to the GPU if there is one. Raises ConfigError for one that says no labels."""
        if not isinstance(trained.model, LabelModel):
            raise ConfigError(
                f"the model was trained with data.objective={trained.objective}, not with labels; one with "
                "model.head.kind was"
            )
        self.kind = trained.model.kind
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = trained.model.to(self._device)
        self._tokenizer = trained.tokenizer
        self._context = trained.model.config.context
        head = trained.model.config.label_head
        self._names = (head and head.labels) or ()

    def told(
        self,
        asked: Sequence[Asked],
        batch: int,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> list[dict[str, Any]]:
        """What the model says of each, ready for JSON.

        A text's label is that of its first tokens, as many as the context holds, as in training; tokens are labelled in
        parts of that length, and an answer is sought in parts that overlap by half.

        Args:
            asked: each with a question if, and only if, the model answers such.
            batch: rows of a forward pass.
            progress: told before each pass how many rows are done, and of how many.

        Raises:
            DataError: a text has no tokens, or a question is too long for the context.
            ConfigError: questions are missing, or the model answers none.
        """
        if any((self.kind == "span") != bool(of.question) for of in asked):
            need = "questions: give --question" if self.kind == "span" else "no questions"
            raise ConfigError(f"the model answers {need} (model.head.kind={self.kind})")
        ids = self._tokenizer.encode([of.text for of in asked])
        rows = [row for number, of in enumerate(asked) for row in self._rows(number, of, ids[number])]
        rows.sort(key=lambda row: -len(row.ids))  # the longest pass comes first, and shows whether memory is enough
        logits: list[list[tuple[_Row, Tensor]]] = [[] for _ in asked]
        for done in range(0, len(rows), batch):
            progress(done, len(rows))
            together = rows[done : done + batch]
            for row, of_row in zip(together, self._logits(together), strict=True):
                logits[row.number].append((row, of_row))
        tell = {"sequence": self._of_text, "token": self._of_tokens, "span": self._answer}[self.kind]
        return [tell(of, found) for of, found in zip(asked, logits, strict=True)]

    def _rows(self, number: int, asked: Asked, text: np.ndarray) -> Iterator[_Row]:
        if not len(text):
            raise DataError(f"text {number + 1} is empty: there is nothing to say of it")
        question = np.empty(0, np.int64)
        if asked.question:
            question = np.append(self._tokenizer.encode([asked.question])[0], self._tokenizer.eos_id)
        room = self._context - len(question)
        if room < 2:
            raise DataError(
                f"question {number + 1} has {len(question)} tokens with its end, and the context is {self._context}: "
                "ask a shorter one"
            )
        stride = room // 2 if self.kind == "span" else room
        for first in range(0, len(text), stride):
            ids = np.concatenate([question, text[first : first + room]])
            yield _Row(number, torch.from_numpy(ids.astype(np.int64)), len(question), first)
            if self.kind == "sequence" or first + room >= len(text):
                return

    @torch.inference_mode()
    def _logits(self, rows: Sequence[_Row]) -> list[Tensor]:
        """Of each row [n, labels], or [1, labels] of a text; on the CPU."""
        lengths = torch.tensor([len(row.ids) for row in rows])
        ids = pad_sequence([row.ids for row in rows], batch_first=True).to(self._device)
        padding = (torch.arange(ids.shape[1]) >= lengths[:, None]).to(self._device)
        zeros = ids.new_zeros(len(rows))
        batch = Batch(ids, ids, zeros, zeros[0], 0, segment_ids=-padding.long(), padding=padding)
        found = self._model.predict(ids, None, batch).float().cpu()
        return [of[:length] for of, length in zip(found, lengths.tolist(), strict=True)]

    def _of_text(self, asked: Asked, found: list[tuple[_Row, Tensor]]) -> dict[str, Any]:
        [(_, logits)] = found
        shares = dict(zip(self._names, logits[0].softmax(-1).tolist(), strict=True))
        label = max(shares, key=lambda name: shares[name])
        return {"text": asked.text, "label": label, "probability": shares[label], "probabilities": shares}

    def _of_tokens(self, asked: Asked, found: list[tuple[_Row, Tensor]]) -> dict[str, Any]:
        """Stretches of tokens of one label that no white space divides; each as likely as its least likely token."""
        logits = torch.cat([of for _, of in sorted(found, key=lambda item: item[0].first)])
        shares, labels = (of.tolist() for of in logits.softmax(-1).max(-1))
        told = list[dict[str, Any]]()
        for (start, end), share, label in zip(self._characters(asked.text), shares, labels, strict=True):
            if start == end:  # white space
                continue
            last = told[-1] if told else None
            if last and last["end"] >= start and last["label"] == self._names[label]:
                last |= {"end": max(end, last["end"]), "probability": min(share, last["probability"])}
            else:
                told.append({"start": start, "end": end, "label": self._names[label], "probability": share})
        tokens = [{"text": asked.text[of["start"] : of["end"]], **of} for of in told]
        return {"text": asked.text, "tokens": tokens}

    def _answer(self, asked: Asked, found: list[tuple[_Row, Tensor]]) -> dict[str, Any]:
        """The likeliest; its probability is that among all places of the part of the text in which it was found."""
        best = None
        for row, logits in found:
            allowed = torch.arange(len(logits)) >= row.before
            first, last = best_places(logits[None], allowed[None])[0].tolist()
            score = float(logits[first, 0] + logits[last, 1])
            if best is None or score > best[0]:
                shares = logits[row.before :].softmax(0)
                share = float(shares[first - row.before, 0] * shares[last - row.before, 1])
                best = score, share, row.first + first - row.before, row.first + last - row.before
        assert best is not None
        _, share, first, last = best
        characters = self._characters(asked.text)
        start, end = int(characters[first][0]), int(characters[last][1])
        told = {"answer": asked.text[start:end], "start": start, "end": end, "probability": share}
        return {"text": asked.text, "question": asked.question, **told}

    def _characters(self, text: str) -> list[tuple[int, int]]:
        """Where the characters of each token begin and end, without white space around them."""
        found = []
        for start, end in self._tokenizer.encode_with_offsets(text)[1].tolist():
            part = text[start:end]
            begin = start + len(part) - len(part.lstrip())
            found.append((begin, max(begin, end - len(part) + len(part.rstrip()))))
        return found


def read_asked(path: Path, text_key: str, question_key: str | None) -> list[Asked]:
    """A text on each line; or, of JSON Lines, a text or a list of its words under `text_key` of each object, and a
    question under `question_key`.

    Raises:
        ConfigError: no such file, not UTF-8, a table, nothing in it, or no JSON Lines where there are questions.
        DataError: a line holds no text, or no question.
    """
    if not (path.is_file() and kind(str(path)) == "jsonl"):
        if question_key and path.is_file():
            raise ConfigError(f"{path}: questions and texts are read from JSON Lines, from a name that ends in .jsonl")
        return [Asked(text) for text in read_texts(path, text_key)]

    def read(record: Mapping[str, Any], where: object, counts: ReadCounts) -> Labelled:
        words = record.get(text_key)
        joined = isinstance(words, list) and all(isinstance(word, str) for word in words)
        told = [" ".join(words)] if joined and words else [text_of(record, text_key, "strict", where, counts)]
        told += [text_of(record, question_key, "strict", where, counts)] if question_key else [""]
        if not told[0] or bool(told[1]) != bool(question_key):
            raise DataError(f"{where}: no text{' or no question' if question_key else ''}; leave the line out")
        return Labelled(told[0], (), 0, told[1])

    found = []
    for document in read_jsonl(str(path), text_key, "strict", ReadCounts(), labels=read):
        assert document.labelled is not None
        found.append(Asked(document.labelled.text, document.labelled.question))
    if not found:
        raise ConfigError(f"{path}: no text in it; write one on each line")
    return found


def shown(told: Mapping[str, Any], as_json: bool = False) -> str:
    """What was said of a text, as a line of JSON, or for a reader: a line, or one for each stretch of tokens."""
    return harmless(json.dumps(told, ensure_ascii=False) if as_json else _lines(told))


def _lines(told: Mapping[str, Any]) -> str:
    if "tokens" in told:
        width = max((len(of["label"]) for of in told["tokens"]), default=0)
        lines = [f"{of['label']:<{width}}  {of['probability']:.4f}  {of['text']}" for of in told["tokens"]]
        return "\n".join([*lines, ""])
    if "answer" in told:
        return f"{told['probability']:.4f}  {told['answer']}"
    return f"{told['label']}  {told['probability']:.4f}  {' '.join(told['text'].split())[:_SHOWN]}"
