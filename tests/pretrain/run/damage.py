"""What a disk may do to a file."""


def flipped(content: bytes, number: int) -> bytes:
    """With one bit turned."""
    changed = bytearray(content)
    changed[number // 8] ^= 1 << number % 8
    return bytes(changed)
