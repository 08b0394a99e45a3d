"""Numbers and sentences in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def counted(number: int, noun: str) -> str:
    """`1 network`, `1,200 networks`: a number with its noun, whose plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def said_once(sentences: Mapping[str, Sequence[str]]) -> list[str]:
    """Each sentence, once: with the first of the things that it is about, and the number of the others."""
    return [
        f"{first}: {sentence}" + (f" (as in {len(others):,} more)" if others else "")
        for sentence, (first, *others) in sentences.items()
    ]
