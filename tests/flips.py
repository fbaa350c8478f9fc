"""Single bits of files, flipped at random."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path


def flip_each(files: Sequence[Path], number: int, seed: int, judge: Callable[[], str]) -> Counter[str]:
    """What `judge` says, counted, while one bit of one file is flipped; `number` times, each file as often as another.

    The files are whole again afterwards.
    """
    choose = random.Random(seed)
    found: Counter[str] = Counter()
    for _ in range(number):
        file = choose.choice(files)
        content = file.read_bytes()
        bit = choose.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            file.write_bytes(flipped)
            found[judge()] += 1
        finally:
            file.write_bytes(content)
    return found
