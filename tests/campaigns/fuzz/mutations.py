"""Mutations of bytes: flipped, deleted, repeated, replaced, or from a target's tokens."""

from random import Random

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
NUMBERS += [2**40, 2**63 - 1, 2**64 - 1]


def change(draw: Random, data: bytes, other: bytes, tokens: list[bytes]) -> bytes:
    """Return `data` with one to four changes. Some insert a piece of `other` or one of `tokens`."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        start = draw.randint(0, len(data))
        end = min(len(data), start + draw.choice([0, 1, 1, 2, 4, 8, 50, 500]))
        offset = draw.randint(0, len(other))
        piece = draw.choice(
            [
                b"",
                draw.choice(tokens),
                draw.choice(tokens),
                draw.randbytes(end - start),
                bytes(byte ^ 1 << draw.randrange(8) for byte in data[start:end]),
                data[start:end] * draw.choice([2, 3, 100]),
                other[offset : offset + draw.choice([1, 4, 50, 500])],
                draw.choice(NUMBERS).to_bytes(8, "little")[: draw.choice([1, 2, 4, 8])],
            ]
        )
        data = data[:start] + piece + data[end:]
    return data
