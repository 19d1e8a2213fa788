"""Lists of numbers on the command lines of the scripts."""

from __future__ import annotations


def numbers(text: str) -> list[int]:
    """Parse `0-4,7`."""
    result: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        result += range(int(first), int(last or first) + 1)
    return result


def fractions(text: str) -> list[float]:
    """Parse `0,0.25,0.5`.

    Raises:
        ValueError: a number is not in 0..1.
    """
    result = [float(part) for part in text.split(",")]
    if not all(0 <= rate <= 1 for rate in result):
        raise ValueError(text)
    return result
