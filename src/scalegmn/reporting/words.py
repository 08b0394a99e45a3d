"""Numbers and sentences in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_KINDS = 8
"""How many kinds of things a sentence lists."""


def counted(number: int, noun: str) -> str:
    """`1 network`, `1,200 networks`: a number with its noun, whose plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def said_once(sentences: Mapping[str, Sequence[str]]) -> list[str]:
    """Each sentence, once: with the first of the things that it is about, and the number of the others."""
    return [
        f"{first}: {sentence}" + (f" (as in {len(others):,} more)" if others else "")
        for sentence, (first, *others) in sentences.items()
    ]


def kinds_counted(numbers: Mapping[str, int]) -> str:
    """`3 .gif, 1 .txt`: how many there are of each kind; of many kinds, the most frequent ones."""
    kinds = sorted(numbers, key=lambda kind: (-numbers[kind], kind))
    shown, others = sorted(kinds[:MOST_KINDS]), kinds[MOST_KINDS:]
    text = ", ".join(f"{numbers[kind]:,} {kind}" for kind in shown)
    return text + (f" and {sum(numbers[kind] for kind in others):,} of other kinds" if others else "")
