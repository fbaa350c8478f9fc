"""Labels in JSON objects: of a text, of its words or stretches of it, or where in it an answer stands."""

import itertools
from collections.abc import Mapping
from typing import Any

from data_pipeline.config import LabelsConfig, SourceConfig, told_names
from data_pipeline.errors import DataError
from data_pipeline.ingest.readers import Errors, Labelled, ReadCounts, Stretch, text_of, whole

OUTSIDE, ANSWER = 0, 1
"""Labels of `data.labels.kind=span`."""
NOTHING = Labelled("", (), 0)
"""What an object without a label, null, counts as: it is left out."""


class LabelReader:
    """What a source's objects say. A call takes an object, how errors name its line, and what is counted.

    Raises DataError that names the line, for what is not there, or not what it should be."""

    def __init__(self, labels: LabelsConfig, source: SourceConfig, errors: Errors) -> None:
        """`errors`: as `data.errors`."""
        self._kind, self._names = labels.kind, {name: number for number, name in enumerate(labels.names)}
        self._none = labels.values - 1
        self._text_key, self._label_key, self._question_key = source.text_key, source.label_key, source.question_key
        self._errors: Errors = errors

    def __call__(self, record: Mapping[str, Any], where: object, counts: ReadCounts) -> Labelled:
        """A text with its labels."""
        told = self._value(record, self._label_key, "label_key", where)
        if told is None:
            return NOTHING
        if self._kind == "token" and isinstance(words := record.get(self._text_key), list):
            return self._of_words(words, told, where, counts)
        text = text_of(record, self._text_key, self._errors, where, counts)
        if self._kind == "sequence":
            return Labelled(text, (Stretch(0, len(text), self._label(told, where)),), self._none)
        if self._kind == "token":
            return self._of_stretches(text, told, where)
        self._value(record, self._question_key, "question_key", where)
        question = text_of(record, self._question_key, self._errors, where, counts)
        if text and not question:
            raise DataError(f"{where}: {self._question_key!r} holds no question; make {self._label_key!r} null, too")
        return Labelled(text, (self._answer(text, told, where),), OUTSIDE, question) if text else NOTHING

    def _value(self, record: Mapping[str, Any], key: str, setting: str, where: object) -> Any:
        if key not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{where} has no key {key!r}; its keys: {keys}. Set {setting} of the source to one of them")
        return record[key]

    def _label(self, told: Any, where: object) -> int:
        """A name's number; a whole number is a name, too."""
        name = str(told) if isinstance(told, int) and not isinstance(told, bool) else told
        if not isinstance(name, str) or name not in self._names:
            raise DataError(
                f"{where}: {told!r:.80} under {self._label_key!r} is none of data.labels.names: "
                f"{told_names([*self._names])}; add it there, mend the line, or make it null, which leaves the object "
                "out"
            )
        return self._names[name]

    def _of_words(self, words: list[Any], told: Any, where: object, counts: ReadCounts) -> Labelled:
        """Words with a label each; they are joined by spaces."""
        if not all(isinstance(word, str) and word for word in words):
            raise DataError(f"{where}: {self._text_key!r} is a list of words, and not all in it are strings with text")
        if not isinstance(told, list) or len(told) != len(words):
            found = f"{len(told)} labels" if isinstance(told, list) else f"a {type(told).__name__}"
            raise DataError(f"{where}: {len(words)} words, and {found} under {self._label_key!r}; each word needs one")
        stretches, start = [], 0
        for word, label in zip(words, told, strict=True):
            stretches.append(Stretch(start, start + len(word), self._label(label, where)))
            start += len(word) + 1
        text = whole(" ".join(words), self._text_key, self._errors, where, counts)
        return Labelled(text, tuple(stretches), self._none)

    def _of_stretches(self, text: str, told: Any, where: object) -> Labelled:
        """Objects with start, end and label; they do not overlap, and all else has the first label."""
        if not isinstance(told, list):
            raise DataError(
                f"{where}: {self._label_key!r} is a {type(told).__name__}, and not a list of stretches (objects with "
                f"start, end, label); labels of words need a list of words under {self._text_key!r}"
            )
        found = []
        for item in told:
            start, end = (item.get("start"), item.get("end")) if isinstance(item, dict) else (None, None)
            if not (type(start) is int and type(end) is int and 0 <= start < end <= len(text)):
                raise DataError(
                    f"{where}: {item!r:.80} under {self._label_key!r} is no object with start and end, characters of "
                    f"the text, which has {len(text)}, and label"
                )
            found.append(Stretch(start, end, self._label(item.get("label"), where)))
        found.sort()
        for one, other in itertools.pairwise(found):
            if other.start < one.end:
                raise DataError(f"{where}: two stretches under {self._label_key!r} overlap at character {other.start}")
        return Labelled(text, tuple(found), 0)

    def _answer(self, text: str, told: Any, where: object) -> Stretch:
        """An object with start and text; also `answer_start` and lists, of which the first counts (SQuAD)."""
        found = told if isinstance(told, dict) else {}
        given = found.get("text"), found.get("start", found.get("answer_start"))
        answer, start = (value[0] if isinstance(value, list) and value else value for value in given)
        if not (isinstance(answer, str) and answer.strip() and type(start) is int and start >= 0):
            raise DataError(
                f"{where}: {told!r:.80} under {self._label_key!r} is no answer, an object with start (a character of "
                "the text) and text; null leaves the object out"
            )
        if text[start : start + len(answer)] != answer:
            there = text[start : start + len(answer)]
            raise DataError(
                f"{where}: the answer is {answer!r:.60}, and at character {start} of {self._text_key!r} stands "
                f"{there!r:.60}"
            )
        return Stretch(start, start + len(answer), ANSWER)
