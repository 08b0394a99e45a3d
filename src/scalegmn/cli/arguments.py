"""Command lines of the subcommands that read no configuration file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from scalegmn.configuration.extensions import IMPORT_HELP, import_extension
from scalegmn.configuration.names import nearest

MESSAGES = {
    r"^argument (\S+): invalid int value: '(.*)'$": r"\1: found \2, expected a whole number",
    r"^argument (\S+): invalid float value: '(.*)'$": r"\1: found \2, expected a number",
    r"^argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)$": r"\1: found \2, expected one of \3",
    r"^argument (\S+): expected (one|at least one) argument$": r"\1: expected a value after it",
    r"^the following arguments are required: (.*)$": r"missing: \1",
}
"""Messages of argparse -> ours."""


class Arguments(argparse.ArgumentParser):
    """An argparse parser whose errors are ValueErrors in one line that name the nearest option, and that has the
    option `--import`.

    Args:
        name: the command: `scalegmn predict`.
        description: what it does, for `--help`.
    """

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=name, description=description, allow_abbrev=False)
        self.add_argument("--import", action="append", default=[], metavar="MODULE", help=IMPORT_HELP)

    def add_example_input(self, required: bool = False) -> None:
        """Adds the options of an `ExampleInput`, of commands that read modules."""
        help_of_shape = "of an input of package.module:factory, or of an ONNX file that leaves it open: 1,3,32,32"
        self.add_argument("--input_shape", required=required, metavar="SHAPE", help=help_of_shape)
        self.add_argument("--words", type=int, metavar="N", help="this input consists of whole numbers below N")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values of these words; the modules of `--import` have been imported then.

        Raises:
            ValueError: an option is unknown, a value is missing or has the wrong type, a module cannot be imported.
        """
        options = [option for action in self._actions for option in action.option_strings]
        names = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        for name in names:
            if name not in options:
                self.error(f"unknown option {name}{nearest(name, options)}")
        values, unknown = self.parse_known_args(words)
        if unknown:
            self.error(f"unexpected argument {unknown[0]}")
        for name in getattr(values, "import"):
            import_extension(name, "--import")
        return values

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's message in our words and the command that explains its options."""
        for pattern, words in MESSAGES.items():
            message = re.sub(pattern, words, message)
        message = message.replace("'", "")
        raise ValueError(f"{self.prog}: {message} ({self.prog} --help explains the options)")
