"""Changes of bytes that readers meet: flipped, lost, doubled, exchanged, or put there from a target's own vocabulary."""

from random import Random

NUMBERS = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**40,
    2**63 - 1,
    2**64 - 1,
]


def change(draw: Random, data: bytes, other: bytes, words: list[bytes]) -> bytes:
    """Return `data` with one to four changes; some take parts of `other`, some put in one of `words`."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        start = draw.randint(0, len(data))
        end = min(len(data), start + draw.choice([0, 1, 1, 2, 4, 8, 50, 500]))
        there = draw.randint(0, len(other))
        part = draw.choice(
            [
                b"",
                draw.choice(words),
                draw.choice(words),
                draw.randbytes(end - start),
                bytes(byte ^ 1 << draw.randrange(8) for byte in data[start:end]),
                data[start:end] * draw.choice([2, 3, 100]),
                other[there : there + draw.choice([1, 4, 50, 500])],
                draw.choice(NUMBERS).to_bytes(8, "little")[: draw.choice([1, 2, 4, 8])],
            ]
        )
        data = data[:start] + part + data[end:]
    return data
