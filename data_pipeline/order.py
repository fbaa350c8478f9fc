"""Which window comes at which sample position: a pure function, with no state and no index files."""

import hashlib

import numpy as np

_ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleOrder:
    """Every epoch visits each window once, in an order of its own.

    A 6-round Feistel network permutes the smallest power of two that holds all windows; an image that is no window is
    permuted again until it is one (cycle walking: Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
    """

    def __init__(self, fingerprint: str, seed: int, num_windows: int) -> None:
        """Raises ValueError if there are no windows."""
        if num_windows < 1:
            raise ValueError(f"num_windows is {num_windows}, must be positive")
        digest = hashlib.sha512(f"{fingerprint}:{seed}".encode()).digest()
        self.num_windows = num_windows
        self._keys = np.frombuffer(digest, np.uint64)[:_ROUNDS]
        bits = max(2, (num_windows - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64(2 ** (bits // 2) - 1)
        self._high_mask = np.uint64(2 ** (bits - bits // 2) - 1)

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """The window at each sample position: int64 [n] to int64 [n]. Positions run on over epochs."""
        positions = np.asarray(positions, np.int64)
        epochs, index = np.divmod(positions, self.num_windows)
        # A new key an epoch, made for all elements at once since a batch may span epochs.
        epoch_keys = _mix((epochs.astype(np.uint64) + np.uint64(1)) * _ODD)
        image = self._permute(index.astype(np.uint64), epoch_keys)
        outside = np.flatnonzero(image >= self.num_windows)
        while len(outside):
            image[outside] = self._permute(image[outside], epoch_keys[outside])
            outside = outside[image[outside] >= self.num_windows]
        return image.astype(np.int64)

    def _permute(self, x: np.ndarray, epoch_keys: np.ndarray) -> np.ndarray:
        high, low = x >> self._low_bits, x & self._low_mask
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                high = high ^ (_mix(low + (epoch_keys ^ key)) & self._high_mask)
            else:
                low = low ^ (_mix(high + (epoch_keys ^ key)) & self._low_mask)
        return (high << self._low_bits) | low
