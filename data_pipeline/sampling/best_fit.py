"""Which documents share a window: best-fit decreasing, for as many lengths at once as come to the same.

After "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv:2404.10830): documents longer than a window
are cut into windows and a rest; then the longest comes first, each into the window with the least room that holds it.
"""

from bisect import bisect_left, insort
from collections import deque
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Windows and what each holds, one slice of a document after the other."""

    bounds: np.ndarray
    """Where the slices of each window begin and end among all, int64 [windows + 1]."""
    starts: np.ndarray
    """First token of each slice, in the stream, int64 [slices]."""
    lengths: np.ndarray
    """Tokens of each slice, int32 [slices]."""


def pack(starts: np.ndarray, lengths: np.ndarray, context: int) -> Packed:
    """Windows of `context` + 1 tokens for documents that begin at `starts`, int64 [n], of `lengths` > 0, int64 [n].

    A document of at most `context` + 1 tokens is one slice. Of a longer one whole windows are cut off, `context` tokens
    apart: the last token of each is the first of the next slice, so that in either case each token but a document's
    first is predicted once. Windows are in the order of their longest slice in the stream.
    """
    starts, lengths = _cut(starts, lengths, context)
    # Longest first; those of a length as they stand in the stream.
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    window = _best_fit(lengths, context + 1)
    # What opens a window is its longest slice, and comes first in it.
    num_windows = int(window.max()) + 1 if len(window) else 0
    opened = np.empty(num_windows, np.int64)
    opened[window[::-1]] = starts[::-1]
    number = np.empty(num_windows, np.int64)
    number[np.argsort(opened, kind="stable")] = np.arange(num_windows)
    window = number[window]
    by_window = np.argsort(window, kind="stable")
    counts = np.bincount(window, minlength=num_windows)
    return Packed(np.concatenate([[0], np.cumsum(counts)]), starts[by_window], lengths[by_window].astype(np.int32))


def _cut(starts: np.ndarray, lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Slices of at most `context` + 1 tokens."""
    whole = np.maximum(0, (lengths - 2) // context)
    pieces = whole + 1
    first = np.cumsum(pieces) - pieces
    place = np.arange(int(pieces.sum())) - np.repeat(first, pieces)
    tokens = np.full(len(place), context + 1)
    tokens[first + whole] = lengths - whole * context
    return np.repeat(starts, pieces) + place * context, tokens


def _best_fit(lengths: np.ndarray, width: int) -> np.ndarray:
    """The window of each slice, int64 [n], for lengths that fall.

    Best fit puts slices of one length into the window with the least room until that holds no more, then into the next;
    windows with the same room do not differ. So all windows of a room and all slices of a length are dealt with at
    once: as many steps as there are lengths and rooms, whatever the number of documents.
    """
    window = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # that there are, rising
    with_room: dict[int, deque[np.ndarray]] = {}

    def keep(room: int, windows: np.ndarray) -> None:
        if room and len(windows):
            if room not in with_room:
                insort(rooms, room)
            with_room.setdefault(room, deque()).append(windows)

    def take(room: int, most: int) -> np.ndarray:
        """Up to `most` windows of a room, of those that came to it together."""
        waiting = with_room[room]
        taken = waiting.popleft()
        if len(taken) > most:
            waiting.appendleft(taken[most:])
        if not waiting:
            del with_room[room], rooms[bisect_left(rooms, room)]
        return taken[:most]

    num_windows = 0
    ends = np.append(np.flatnonzero(np.diff(lengths)) + 1, len(lengths)).tolist() if len(lengths) else []
    done = 0
    for end in ends:
        length = int(lengths[done])
        while done < end:
            which = bisect_left(rooms, length)
            room = rooms[which] if which < len(rooms) else width
            each = room // length
            wanted = -(-(end - done) // each)
            if which < len(rooms):
                windows = take(room, wanted)
            else:
                windows = np.arange(num_windows, num_windows + wanted)
                num_windows += wanted
            filled = min(len(windows) * each, end - done)
            window[done : done + filled] = np.repeat(windows, each)[:filled]
            done += filled
            full, over = divmod(filled, each)
            keep(room - each * length, windows[:full])
            if over:
                keep(room - over * length, windows[full:])
    return window
