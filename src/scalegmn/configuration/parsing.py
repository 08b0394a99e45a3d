"""From YAML files and command line words to one frozen dataclass."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from scalegmn.configuration.extensions import IMPORT_HELP, import_extension
from scalegmn.configuration.files import leaves, read_yaml
from scalegmn.configuration.names import nearest
from scalegmn.configuration.types import expected, problem, type_of

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")

Translate = Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]]
"""The content of a file -> settings of the dataclass, and remarks for stderr; may raise ValueError."""

HELP = ("-h", "--help")
"""Words that ask for help."""

PRINT_CONFIG = "--print_config"
"""The word that prints the complete configuration, if nothing is wrong with it, and ends the process."""

NO_OPTION = {"option": False}
"""Metadata of a field that is neither an option of the command line nor a key of files."""

COMMAND_LINE = "command line"
"""Where settings come from that are in no file, in messages."""

IMPORTS = "imports"
"""The key of files that lists modules to import first, and the field that keeps them, where a dataclass has it."""


def parse(
    config_class: type[Config],
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    translate: Translate | None = None,
    extend: Callable[[type[Config], Mapping[str, Any] | None], type[Config]] | None = None,
) -> Config:
    """An instance of a dataclass. Precedence: defaults < `--conf` files from left to right < command line.

    Modules that `--import`, or the key `imports` of a file, names are imported first.

    Args:
        config_class: the dataclass; nested dataclasses are sections, the docstring under a field is its help.
        arguments: command line words; None: those of the process.
        prog: the program's name in `--help`.
        translate: how files are understood; None: they hold settings of the dataclass.
        extend: called after the imports, with the dataclass and all settings by dotted key (None where help is asked
            for): the subclass to read, which may have more fields.

    Raises:
        ValueError: a file is missing, keys are unknown, values have the wrong type or contradict each other. The
            message names each problem and, for an unknown key, the nearest valid one.
    """
    source = read(arguments, translate)
    asks_for_help = any(word in HELP for word in source.words)
    if extend is not None:
        given_keys = {key: value for _, key, value in source.settings(whole={})}
        config_class = extend(config_class, None if asks_for_help else given_keys)
    parser = _parser(config_class, prog)
    if asks_for_help:
        parser.parse_args(["--help"])  # prints and exits
    problems = source.problems
    of_parser = parser.get_defaults(skip_validation=True)
    defaults = dict(of_parser.items())
    given = source.settings(whole=defaults)  # a field may be a mapping itself
    problems += _key_problems(defaults, given)
    given = [setting for setting in given if setting[1] in defaults]
    problems += [text for setting in given for text in _null_problems(config_class, *setting)]
    files = [f"--conf={yaml.safe_dump(content, sort_keys=False)}" for _, content in source.contents if content]
    words = [word for word in source.words if word.partition("=")[0] != PRINT_CONFIG]
    try:
        values = parser.parse_args(files + words, namespace=of_parser, defaults=False)
    except ArgumentError as error:  # only now each setting by itself, which takes a while
        problems += [text for setting in given for text in _value_problems(config_class, parser, *setting)]
        problems = problems or [_one_line(error)]
    if problems:
        raise ValueError("; ".join(problems))
    for remark in source.remarks:
        print(remark, file=sys.stderr)
    try:
        config, problems = _instantiate(config_class, values, {IMPORTS: tuple(dict.fromkeys(source.imports))})
        if config is None:
            raise ValueError("; ".join(problems))
        if words != source.words:
            parser.parse_args(files + source.words)  # prints and exits
    except ArgumentError as error:
        raise ValueError(_one_line(error)) from None
    return config


@dataclass
class Source:
    """What files and the command line hold."""

    contents: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Each file with its settings."""

    words: list[str] = field(default_factory=list)
    """Settings on the command line, `--key=value`."""

    imports: list[str] = field(default_factory=list)
    """Modules that have been imported."""

    remarks: list[str] = field(default_factory=list)
    """What to tell the user."""

    problems: list[str] = field(default_factory=list)
    """What is wrong with files."""

    def settings(self, whole: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        """Each setting with its source: (source, key, value)."""
        of_files = [(file, key, value) for file, content in self.contents for key, value in leaves(content, "", whole)]
        return of_files + [(COMMAND_LINE, key, value) for key, value in _options(self.words)]


def read(arguments: Sequence[str] | None, translate: Translate | None) -> Source:
    """Files and words, after the modules that they name have been imported: the command line's first, which may say
    where a file's are now."""
    files, words = split_arguments(arguments)
    alone = [word for word in words if not word.startswith("-")]
    if alone:
        remedy = f"--conf {alone[0]}" if alone[0].endswith((".yml", ".yaml", ".json")) else "--key value"
        raise ValueError(f"{COMMAND_LINE}: found {alone[0]}, expected options; write {remedy}")
    source = Source(words=[word for word in words if not word.startswith("--import=")])
    named = [("--import", word.removeprefix("--import=")) for word in words if word.startswith("--import=")]
    for file in files:
        content = read_yaml(file)
        remarks: list[str] = []
        try:
            content, remarks = (content, []) if translate is None else translate(content)
        except ValueError as error:
            source.problems.append(f"{file}: {error}")
            continue
        content = dict(content)
        modules = content.pop(IMPORTS, None) or []
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise ValueError(f"{file}: {IMPORTS}: found {modules!r}, expected a list of modules")
        named += [(f"{file}: {IMPORTS}", module) for module in modules]
        source.contents.append((file, content))
        source.remarks += [f"{file}: {remark}" for remark in remarks]
    source.imports = [import_extension(module, where) for where, module in named]
    return source


def _parser(config_class: type, prog: str | None) -> ArgumentParser:
    """A parser with an option for each field; made once, since that takes up to half a second."""
    return _make_parser(config_class, prog, tuple((key, tuple(names)) for key, names in _names(config_class)))


@lru_cache(maxsize=64)
def _make_parser(
    config_class: type, prog: str | None, names: tuple[tuple[str, tuple[str, ...]], ...]
) -> ArgumentParser:
    """A parser whose help for some keys ends with the names that are known."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--conf", action="config", help="YAML file of settings; several are merged left to right.")
    parser.add_argument("--import", default=SUPPRESS, metavar="MODULE", help=IMPORT_HELP)
    hidden = {item.name for item in fields(config_class) if item.metadata == NO_OPTION}
    parser.add_class_arguments(config_class, None, skip=hidden)
    known = dict(names)
    for action in parser._actions:
        if action.dest in known:
            action.help = f"{action.help} One of {', '.join(known[action.dest])}."
    return parser


def _names(config_class: type, prefix: str = "") -> Iterator[tuple[str, Collection[str]]]:
    """Dotted key and known names of each field that has any (`names` in its metadata), also in sections."""
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        if "names" in item.metadata:
            yield f"{prefix}{item.name}", item.metadata["names"]
        elif is_dataclass(hints[item.name]):
            yield from _names(hints[item.name], f"{prefix}{item.name}.")


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
        if word in ("--conf", "--import"):
            raise ValueError(f"{word}: expected a {'YAML file' if word == '--conf' else 'module'} after it")
        if word.startswith("--conf="):
            files.append(word.removeprefix("--conf="))
        else:
            words.append(word)
    return files, words


def _key_problems(defaults: Mapping[str, Any], given: Sequence[tuple[str, str, Any]]) -> list[str]:
    """One sentence per given (source, key, value) whose key is not a field."""
    known = [key for key in defaults if key != "conf"]
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


def _null_problems(config_class: type, source: str, key: str, value: Any) -> list[str]:
    """A sentence if null is given for a field that cannot be null."""
    if value not in (None, "null"):
        return []
    hint = type_of(config_class, key)
    found = "nothing after it" if source == COMMAND_LINE and value is None else "null"
    is_possible = type(None) in get_args(hint) and found == "null"
    return [] if is_possible else [f"{source}: {key}: found {found}, expected {expected(hint)}"]


def _value_problems(config_class: type, parser: ArgumentParser, source: str, key: str, value: Any) -> list[str]:
    """What is wrong with the type of one value; null is left to `_null_problems`."""
    if value in (None, "null"):
        return []
    try:
        if source == COMMAND_LINE:
            parser.parse_args([f"--{key}={value}"], defaults=False)
        else:
            nested = value
            for name in reversed(key.split(".")):
                nested = {name: nested}
            parser.parse_object(nested, defaults=False)
    except ArgumentError:
        return [f"{source}: {key}: {problem(type_of(config_class, key), value)}"]
    return []


def _instantiate(
    config_class: type[Config], values: Namespace, extra: Mapping[str, Any]
) -> tuple[Config | None, list[str]]:
    """The dataclass of parsed values, section by section, with the values of `extra` for fields that are no options;
    None and all messages where sections are refused."""
    hints = get_type_hints(config_class)
    content: dict[str, Any] = {}
    problems: list[str] = []
    for item in fields(config_class):  # type: ignore[arg-type]  # a dataclass, which a TypeVar cannot say
        if item.metadata == NO_OPTION:
            content |= {item.name: extra[item.name]} if item.name in extra else {}
            continue
        content[item.name] = values[item.name]
        if is_dataclass(hints[item.name]):
            section, refused = _instantiate(hints[item.name], values[item.name], {})
            problems += refused
            content[item.name] = hints[item.name]() if section is None else section
    try:
        config = config_class(**content)
    except ValueError as error:
        return None, [*problems, str(error)]
    return (None if problems else config), problems


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Key and value of each setting `--key=value`; None for a bare `--key`."""
    for word in words:
        key, equals, value = word.partition("=")
        if key != PRINT_CONFIG:
            yield key.removeprefix("--"), value if equals else None


def _one_line(error: Exception) -> str:
    """The parser's message without its line breaks and Python's type names."""
    text = " ".join(str(error).split())
    for old, new in {'Parser key "': "", '":': ":", "typing.Literal": "one of ", "<class '": "", "'>": ""}.items():
        text = text.replace(old, new)
    return text
