"""The command `scalegmn`: one file per subcommand, imported when the subcommand is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from scalegmn.cli.dispatch import Group
from scalegmn.reporting.errors import user_errors

SCALEGMN = Group(
    "scalegmn",
    "Learning on the weights of neural networks.",
    {
        "train": "train and test a metanetwork on a task",
        "zoo": "make, inspect and convert zoos of networks",
        "predict": "apply a trained model to networks in files",
        "explore": "write one page that shows zoos, runs or networks",
        "explain": "show which neurons and weights a prediction rests on",
        "export": "write a trained model as a bundle, one folder to pass on",
        "symmetry": "measure which symmetries a model keeps",
        "inspect": "show how a module of your own is read: its layers, and which neurons move",
        "compare": "train several models on one zoo, over seeds, and compare results and costs",
        "optimizers": "compare learned optimisers with tuned ones",
        "sweep": "search hyper-parameters by their validation results",
        "report": "write one HTML page about several runs",
        "demo": "make a small zoo, train on it, and compare with simple baselines",
    },
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Wrong input ends the process with one line on stderr and exit code 2.

    Args:
        arguments: the words after `scalegmn`; None: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for --import and package.module:factory, as under `python -m`
    with user_errors():
        if words == ["--version"]:
            import scalegmn

            print(f"scalegmn {scalegmn.__version__}")
        else:
            SCALEGMN.run(words)
