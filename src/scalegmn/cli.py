"""From YAML files and command line words to one frozen dataclass."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")


def parse(config_class: type[Config], arguments: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """An instance of a dataclass. Precedence: defaults < `--conf` files from left to right < command line.

    Args:
        config_class: the dataclass; nested dataclasses are sections, the docstring under a field is its help.
        arguments: command line words; None: those of the process.
        prog: the program's name in `--help`.

    Raises:
        ValueError: a file is missing, keys are unknown, values have the wrong type or contradict each other. One
            message names each and, for an unknown key, the nearest valid one.
    """
    files, words = _split(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--conf", action="config", help="YAML file of settings; several are merged left to right.")
    parser.add_class_arguments(config_class, None)
    contents = {file: _read(file) for file in files}
    problems = _unknown_keys(parser, contents, words)
    if problems:
        raise ValueError("; ".join(problems))
    try:
        found = parser.parse_args([word for file in files for word in ("--conf", file)] + words)
    except ArgumentError as error:
        raise ValueError("; ".join(_wrong_values(parser, contents, words)) or _one_line(error)) from None
    values = vars(parser.instantiate(found))
    del values["conf"]
    return config_class(**values)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The `--conf` files, and all other words: the command line wins wherever `--conf` stands in it."""
    files, words = [], []
    pending = iter(arguments)
    for word in pending:
        if word == "--conf":
            files.append(next(pending, None))
        elif word.startswith("--conf="):
            files.append(word.removeprefix("--conf="))
        else:
            words.append(word)
    if None in files:
        raise ValueError("--conf: expected a YAML file after it")
    return files, words


def _read(file: str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if not Path(file).is_file():
        near = difflib.get_close_matches(file, map(str, Path().glob("configs/*/*.yml")), n=1)
        raise ValueError(f"--conf {file}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--conf {file}: not YAML ({_one_line(error)})") from None
    if not isinstance(content or {}, dict):
        raise ValueError(f"--conf {file}: found a {type(content).__name__}, expected keys and values")
    return content or {}


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _unknown_keys(parser: ArgumentParser, contents: dict[str, dict[str, Any]], words: Sequence[str]) -> list[str]:
    """One sentence per key that is in a file or on the command line and not in the configuration."""
    known = [key for key, _ in parser.get_defaults().items() if key != "conf"]
    sections = {key[:end] for key in known for end, letter in enumerate(key) if letter == "."}
    given = [(file, key, value) for file, content in contents.items() for key, value in _leaves(content)]
    given += [("command line", key, None) for key, _ in _options(words)]
    problems = []
    for source, key, value in given:
        if key in known or (key in sections and value in (None, {})) or key in ("help", "print_config"):
            continue
        if key in sections:
            problems.append(f"{source}: {key} is a section, found {value!r}")
        else:
            names = {name.rpartition(".")[2]: name for name in known}
            near = difflib.get_close_matches(key, known, n=1) or [
                names[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(names), n=1)
            ]
            problems.append(f"{source}: unknown key {key}" + (f", did you mean {near[0]}?" if near else ""))
    return problems


def _wrong_values(parser: ArgumentParser, contents: dict[str, dict[str, Any]], words: Sequence[str]) -> list[str]:
    """One sentence per value of the wrong type; only called after parsing has failed."""
    problems = []
    for file, content in contents.items():
        for key, value in _leaves(content):
            nested = value
            for name in reversed(key.split(".")):
                nested = {name: nested}
            try:
                parser.parse_object(nested)
            except ArgumentError as error:
                problems.append(f"{file}: {_one_line(error)}")
    for key, value in _options(words):
        try:
            parser.parse_args([f"--{key}"] if value is None else [f"--{key}={value}"])
        except ArgumentError as error:
            problems.append(f"command line: {_one_line(error)}")
    return problems


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Key and value of each `--key value` or `--key=value`."""
    for index, word in enumerate(words):
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            follows = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("--") else None
            yield key, value if equals else follows


def _one_line(error: Exception) -> str:
    """The parser's message without its line breaks and Python's type names."""
    text = " ".join(str(error).split())
    for old, new in {'Parser key "': "", '":': ":", "typing.Literal": "one of ", "<class '": "", "'>": ""}.items():
        text = text.replace(old, new)
    return text
