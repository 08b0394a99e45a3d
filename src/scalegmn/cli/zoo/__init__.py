"""`scalegmn zoo`: zoos of networks."""

from __future__ import annotations

from collections.abc import Sequence

from scalegmn.cli.dispatch import Group

ZOO = Group(
    "scalegmn zoo",
    "Zoos: many networks, with labels, splits and provenance, in one folder.",
    {
        "inr": "fit implicit neural representations to images",
        "cnn": "train small CNNs that classify images",
        "import": "write a zoo of networks of your own, with their labels or scores",
        "info": "print what a zoo holds",
        "verify": "check every checksum and every weight of a zoo",
        "export": "write one network of a zoo as a state dict",
        "canonicalize": "write a canonical copy of a zoo",
        "splits": "draw the splits of the published MNIST INRs",
        "published": "write a zoo of CNNs in the published layout",
    },
)


def run(words: Sequence[str]) -> None:
    """Runs a subcommand of `scalegmn zoo`."""
    ZOO.run(words)
