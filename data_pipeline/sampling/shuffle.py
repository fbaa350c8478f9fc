"""Which window comes at which sample position of a source: a pure function, with no state and no index files."""

import hashlib
from functools import lru_cache

import numpy as np

_ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(seed: int, purpose: str, positions: np.ndarray, width: int) -> np.ndarray:
    """Draws that depend on nothing else: uint64 [n, width], each row that of a sample position, int64 [n]."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{purpose}".encode()).digest(), np.uint64)
    rows = _mix((positions.astype(np.uint64) + np.uint64(1)) * _ODD ^ key[0])
    columns = _mix((np.arange(width, dtype=np.uint64) + np.uint64(1)) * _ODD ^ key[1])
    return _mix(rows[:, None] + columns)


class Permutation:
    """Keyed permutations of 0 to n - 1, one for each tweak.

    A 6-round Feistel network permutes the smallest power of two that holds n; an image that is not below n is
    permuted again until it is (cycle walking: Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
    """

    def __init__(self, key: str, n: int) -> None:
        self.n = n
        self._keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), np.uint64)[:_ROUNDS]
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64(2 ** (bits // 2) - 1)
        self._high_mask = np.uint64(2 ** (bits - bits // 2) - 1)

    def __call__(self, index: np.ndarray, tweak: np.ndarray) -> np.ndarray:
        """The image of each index under the permutation of its tweak: int64 [n], int64 [n] to int64 [n]."""
        # Round keys are made for all elements at once, since a batch may span tweaks.
        tweaks = _mix((tweak.astype(np.uint64) + np.uint64(1)) * _ODD)
        image = self._permute(index.astype(np.uint64), tweaks)
        outside = np.flatnonzero(image >= self.n)
        while len(outside):
            image[outside] = self._permute(image[outside], tweaks[outside])
            outside = outside[image[outside] >= self.n]
        return image.astype(np.int64)

    def _permute(self, x: np.ndarray, tweaks: np.ndarray) -> np.ndarray:
        high, low = x >> self._low_bits, x & self._low_mask
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                high = high ^ (_mix(low + (tweaks ^ key)) & self._high_mask)
            else:
                low = low ^ (_mix(high + (tweaks ^ key)) & self._low_mask)
        return (high << self._low_bits) | low


class SampleOrder:
    """Every epoch visits each window once, in an order of its own.

    With `block`, windows are visited block by block, the blocks in an order of their own and the windows of a block in
    theirs: what is read at a time lies in few shards. The last block holds what is left, up to `block` windows.
    """

    def __init__(self, fingerprint: str, seed: int, num_windows: int, block: int | None = None) -> None:
        """`fingerprint` names the windows, `seed` the run. Raises ValueError if there are no windows."""
        if num_windows < 1 or (block is not None and block < 1):
            raise ValueError(f"num_windows is {num_windows} and block {block}, must be positive")
        key = f"{fingerprint}:{seed}"
        self.num_windows = num_windows
        self._all = Permutation(key, num_windows)
        self._block = block if block is not None and block < num_windows else None
        if self._block:
            num_blocks = -(-num_windows // self._block)
            self._tail = num_windows - (num_blocks - 1) * self._block
            self._blocks = Permutation(f"{key}:blocks", num_blocks)
            self._in_block = Permutation(f"{key}:block", self._block)
            self._in_tail = Permutation(f"{key}:tail", self._tail)
            self._place_of_last = lru_cache(maxsize=8)(self._find_last)

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """The window at each sample position: int64 [n] to int64 [n]. Positions run on over epochs."""
        epochs, index = np.divmod(np.asarray(positions, np.int64), self.num_windows)
        return self._by_blocks(index, epochs) if self._block else self._all(index, epochs)

    def block(self, position: int) -> tuple[int, int, int]:
        """The block that is being read at a sample position: its first window, the one behind its last, and the
        position at which the next block begins."""
        epoch, index = divmod(position, self.num_windows)
        if not self._block:
            return 0, self.num_windows, (epoch + 1) * self.num_windows
        last, lacks = self._place_of_last(epoch), self._block - self._tail
        place = (index + (lacks if index >= last * self._block + self._tail else 0)) // self._block
        first = int(self._blocks(np.array([place]), np.array([epoch]))[0]) * self._block
        end = (place + 1) * self._block - (lacks if place >= last else 0)
        return first, min(first + self._block, self.num_windows), epoch * self.num_windows + end

    def _by_blocks(self, index: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The last block may come anywhere in an epoch; behind it, all begin earlier by what it lacks."""
        assert self._block is not None
        lacks = self._block - self._tail
        different = np.unique(epochs)
        last = np.array([self._place_of_last(epoch) for epoch in different.tolist()])[
            np.searchsorted(different, epochs)
        ]
        padded = index + np.where(index >= last * self._block + self._tail, lacks, 0)
        place, within = np.divmod(padded, self._block)
        blocks = self._blocks(place, epochs)
        tail = place == last
        inner = np.empty_like(index)
        # A block of another epoch has another key: blocks are numbered on.
        number = epochs * self._blocks.n + blocks
        inner[~tail] = self._in_block(within[~tail], number[~tail])
        inner[tail] = self._in_tail(within[tail], number[tail])
        return blocks * self._block + inner

    def _find_last(self, epoch: int) -> int:
        """At which place of an epoch its last block comes."""
        places = np.arange(self._blocks.n)
        return int(np.flatnonzero(self._blocks(places, np.full_like(places, epoch)) == self._blocks.n - 1)[0])
