"""What a linear probe is asked about each token: tokens around it, and words and sentences by spaces and marks alone.

No tagger and no list of words is needed. What is not known in a window, such as the place in a word that began before
it, is not asked.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.tokenize.tokenizer import Tokenizer

NOT_ASKED = -1
COMMON = 64
"""Questions for a token are asked where it is one of so many, the most frequent ones."""
READ = {
    "token": "the token itself",
    "before": "the token before",
    "word_place": "place in the word",
    "sentence_place": "words of the sentence so far",
    "capital": "the word began with a capital",
}
"""What the text up to a token holds."""
AHEAD = {
    "next": "the next token",
    "word_ends": "the word ends here",
    "sentence_ends": "the sentence ends next",
}
"""What only the token after it tells."""
QUESTIONS = READ | AHEAD
SENTENCE_MARKS = frozenset(".!?…。！？")
LAST_PLACE = 4
"""Further places in a word count as this one."""


def common_tokens(windows: np.ndarray) -> np.ndarray:
    """The COMMON most frequent tokens of windows, int64 [<= COMMON]; of equals the lower ids."""
    ids, counts = np.unique(windows, return_counts=True)
    return ids[np.argsort(-counts, kind="stable")][:COMMON]


def answers(windows: np.ndarray, common: np.ndarray, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Of windows int64 [n, T + 1] the class of each question at the first T tokens, int64 [n, T]; or NOT_ASKED.

    `common`: the tokens that are asked for; their place in it is the class.
    """
    classes = np.full(max(windows.max(), common.max()) + 1, NOT_ASKED)
    classes[common] = np.arange(len(common))
    of_token = classes[windows]
    before = np.roll(of_token, 1, axis=1)
    before[:, 0] = NOT_ASKED
    texts = {token: tokenizer.decode([token]) for token in np.unique(windows).tolist()}
    rows = [list(_places([texts[token] for token in row])) for row in windows.tolist()]
    found = np.array(rows, np.int64)  # [n, T, questions]
    named = {name: found[:, :, number] for number, name in enumerate(WordPlace._fields)}
    return named | {"token": of_token[:, :-1], "before": before[:, :-1], "next": of_token[:, 1:]}


class WordPlace(NamedTuple):
    """Classes of the questions about words and sentences at one token."""

    word_place: int = NOT_ASKED
    """0 between words, else 1 to LAST_PLACE."""
    sentence_place: int = NOT_ASKED
    """Of none, 1, 2 to 3, 4 to 7, 8 to 15, or more words begun."""
    capital: int = NOT_ASKED
    word_ends: int = NOT_ASKED
    sentence_ends: int = NOT_ASKED


def _places(texts: Sequence[str]) -> list["WordPlace"]:
    """Of the texts of T + 1 tokens, of the first T; the text of one that ends a document is empty."""
    found = []
    place: int | None = None
    words: int | None = None
    capital, was_word = False, True
    for text, behind in itertools.pairwise(texts):
        is_word = _in_word(text)
        if is_word and (not was_word or text[0].isspace()):
            place, words = 1, None if words is None else words + 1
            capital = next(character for character in text if character.isalnum()).isupper()
        elif not is_word:
            place = 0
        elif place is not None:
            place += 1
        known = is_word and place is not None
        found.append(
            WordPlace(
                NOT_ASKED if place is None else min(place, LAST_PLACE),
                NOT_ASKED if words is None else min(words.bit_length(), 5),
                int(capital) if known else NOT_ASKED,
                int(not _in_word(behind) or behind[0].isspace()) if is_word else NOT_ASKED,
                int(_ends_sentence(behind)),
            )
        )
        was_word = is_word
        if _ends_sentence(text):
            words = 0
    return found


def _in_word(text: str) -> bool:
    """Whether a token is of a word: it has a letter or a digit."""
    return any(character.isalnum() for character in text)


def _ends_sentence(text: str) -> bool:
    return not text or not SENTENCE_MARKS.isdisjoint(text)
