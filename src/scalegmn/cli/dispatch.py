"""From the first word of a command to the module that runs it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from scalegmn.configuration.names import nearest

HELP = ("-h", "--help")
"""Words that ask for help."""


@dataclass(frozen=True)
class Group:
    """A command with subcommands. Each is a module of the package with the group's name, and has a function
    `run(words)`.

    Attributes:
        name: the command: `scalegmn`, or `scalegmn zoo`.
        description: what it is for, for `--help`.
        commands: subcommand -> what it does, for `--help`.
    """

    name: str
    description: str
    commands: Mapping[str, str]

    def run(self, words: Sequence[str]) -> None:
        """Runs the subcommand that the first word names, with the other words.

        Raises:
            ValueError: the first word is missing or names no subcommand.
        """
        if words and words[0] in HELP:
            print(self.help())
            sys.exit(0)
        expected = f"expected one of {', '.join(self.commands)}"
        if not words:
            raise ValueError(f"{self.name}: a command is missing, {expected}")
        name = words[0]
        if name not in self.commands:
            raise ValueError(f"{self.name}: unknown command {name}{nearest(name, self.commands) or f', {expected}'}")
        package = self.name.replace("scalegmn", "scalegmn.cli", 1).replace(" ", ".")
        import_module(f"{package}.{name}").run(list(words[1:]))

    def help(self) -> str:
        """The text of `--help`."""
        width = max(map(len, self.commands))
        lines = [f"  {name:<{width}}  {text}" for name, text in self.commands.items()]
        usage = f"usage: {self.name} COMMAND ..."
        return "\n".join(
            [usage, "", self.description, "", *lines, "", f"{self.name} COMMAND --help explains a command."]
        )
