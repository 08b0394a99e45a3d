"""From YAML files and command line words to one frozen dataclass."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")

EXITS = ("-h", "--help", "--print_config")
"""Words that print something and end the program."""


def parse(
    config_class: type[Config],
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    translate: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]] | None = None,
) -> Config:
    """An instance of a dataclass. Precedence: defaults < `--conf` files from left to right < command line.

    Args:
        config_class: the dataclass; nested dataclasses are sections, the docstring under a field is its help.
        arguments: command line words; None: those of the process.
        prog: the program's name in `--help`.
        translate: what a file holds -> settings of the dataclass, and remarks for stderr; may raise ValueError.

    Raises:
        ValueError: a file is missing, keys are unknown, values have the wrong type or contradict each other. One
            message names each and, for an unknown key, the nearest valid one.
    """
    files, words = split_arguments(arguments)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--conf", action="config", help="YAML file of settings; several are merged left to right.")
    parser.add_class_arguments(config_class, None)
    contents, remarks, problems = [], [], []
    for file in files:
        content, found = read_yaml(file), []
        try:
            content, found = (content, []) if translate is None else translate(content)
        except ValueError as error:
            problems.append(f"{file}: {error}")
            continue
        contents.append((file, content))
        remarks += [f"{file}: {remark}" for remark in found]
    known = [key for key, _ in parser.get_defaults().items()]  # a field may be a mapping itself
    given = [(file, key, value) for file, content in contents for key, value in leaves(content, whole=known)]
    given += [("command line", key, value) for key, value in _options(words)]
    known = dict(parser.get_defaults().items())
    problems += _key_problems(parser, given)
    given = [setting for setting in given if setting[1] in known]
    problems += [problem for setting in given for problem in _null_problems(config_class, *setting)]
    sources = [f"--conf={yaml.safe_dump(content, sort_keys=False)}" for _, content in contents if content]
    settings = [word for word in words if word.partition("=")[0] not in EXITS]
    try:
        values = parser.parse_args(sources + settings)
    except ArgumentError as error:  # only now one by one, which takes a while
        problems += [problem for setting in given for problem in _value_problems(parser, *setting)]
        problems = problems or [_one_line(error)]
    if problems:
        raise ValueError("; ".join(problems))
    for remark in remarks:
        print(remark, file=sys.stderr)
    try:
        config, problems = _instantiate(config_class, values)
        if problems:
            raise ValueError("; ".join(problems))
        if settings != words:
            parser.parse_args(sources + words)  # prints and exits
    except ArgumentError as error:
        raise ValueError(_one_line(error)) from None
    return config


def split_arguments(arguments: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """The `--conf` files, and all other words with each option joined to its value as `--key=value`.

    So the command line wins wherever `--conf` stands in it, and a value may start with a minus sign.
    """
    files, words = [], []
    pending = list(sys.argv[1:] if arguments is None else arguments)[::-1]
    while pending:
        word = pending.pop()
        if word.startswith("--") and "=" not in word and pending and not pending[-1].startswith("--"):
            word = f"{word}={pending.pop()}"
        key, equals, value = word.partition("=")
        if value.startswith("~"):  # which shells leave alone here
            word = f"{key}{equals}{os.path.expanduser(value)}"
        if word == "--conf":
            raise ValueError("--conf: expected a YAML file after it")
        if word.startswith("--conf="):
            files.append(word.removeprefix("--conf="))
        else:
            words.append(word)
    return files, words


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file of settings, or a `.json` file; raises ValueError with its name."""
    file = str(file)
    if not Path(file).is_file():
        near = difflib.get_close_matches(file, map(str, Path().glob("configs/*/*.yml")), n=1)
        raise ValueError(f"--conf {file}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        text = Path(file).read_text()
        content = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)  # 1e-5 is no number in YAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if file.endswith(".json") else "YAML"
        raise ValueError(f"--conf {file}: not {kind} ({_one_line(error)})") from None
    if not isinstance(content or {}, dict):
        raise ValueError(f"--conf {file}: found a {type(content).__name__}, expected keys and values")
    return content or {}


def leaves(content: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; those named in `whole` stay together."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in whole:
            yield from leaves(value, f"{prefix}{key}.", whole)
        else:
            yield f"{prefix}{key}", value


def _key_problems(parser: ArgumentParser, given: Sequence[tuple[str, str, Any]]) -> list[str]:
    """One sentence per given (source, key, value) whose key is not a field."""
    known = [key for key, _ in parser.get_defaults().items() if key != "conf"]
    sections = {key[:end] for key in known for end, letter in enumerate(key) if letter == "."}
    problems = []
    for source, key, value in given:
        if key in known:
            continue
        if key in sections:
            problems.append(f"{source}: {key} is a section of keys, found {value!r}")
            continue
        problems.append(f"{source}: unknown key {key}{nearest(key, known)}")
    return problems


def nearest(key: str, known: Collection[str]) -> str:
    """`, did you mean ...?` with the known key nearest to an unknown one, by the whole or the last part; else empty."""
    last_parts = {name.rpartition(".")[2]: name for name in reversed(list(known))}  # the first of equal ones
    near = [last_parts[key]] if key in last_parts else difflib.get_close_matches(key, known, n=1)
    near = near or [
        last_parts[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(last_parts), n=1)
    ]
    return f", did you mean {near[0]}?" if near else ""


def _null_problems(config_class: type, source: str, key: str, value: Any) -> list[str]:
    """Whether a null stands where it means nothing."""
    if value not in (None, "null"):
        return []
    owner = config_class
    *sections, name = key.split(".")
    for section in sections:
        owner = get_type_hints(owner)[section]
    return [] if type(None) in get_args(get_type_hints(owner)[name]) else [f"{source}: {key}: found null"]


def _value_problems(parser: ArgumentParser, source: str, key: str, value: Any) -> list[str]:
    """What is wrong with the type of one value; nothing with null, which is for `_null_problems`."""
    if value in (None, "null"):
        return []
    try:
        if source == "command line":
            parser.parse_args([f"--{key}={value}"])
        else:
            nested = value
            for name in reversed(key.split(".")):
                nested = {name: nested}
            parser.parse_object(nested)
    except ArgumentError as error:
        return [f"{source}: {_one_line(error)}"]
    return []


def _instantiate(config_class: type[Config], values: Namespace) -> tuple[Config | None, list[str]]:
    """The dataclass of parsed values, section by section; None and all messages where sections are refused."""
    hints, content, problems = get_type_hints(config_class), {}, []
    for item in fields(config_class):
        content[item.name] = values[item.name]
        if is_dataclass(hints[item.name]):
            section, found = _instantiate(hints[item.name], values[item.name])
            problems += found
            content[item.name] = hints[item.name]() if section is None else section
    try:
        config = config_class(**content)
    except ValueError as error:
        problems.append(str(error))
    return (None if problems else config), problems


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Key and value of each setting `--key=value`; None for a bare `--key`."""
    for word in words:
        key, equals, value = word.partition("=")
        if key not in EXITS:
            yield key.removeprefix("--"), value if equals else None


def _one_line(error: Exception) -> str:
    """The parser's message without its line breaks and Python's type names."""
    text = " ".join(str(error).split())
    for old, new in {'Parser key "': "", '":': ":", "typing.Literal": "one of ", "<class '": "", "'>": ""}.items():
        text = text.replace(old, new)
    return text
