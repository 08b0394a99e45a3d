"""Types of settings in words, for error messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from scalegmn.configuration.names import nearest

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "keys and values"}
"""Plain types."""

EXAMPLES = {int: ("16", "32"), float: ("0.1", "0.5"), str: ("a", "b")}
"""Values of lists."""


def type_of(config_class: type, key: str) -> Any:
    """The type of a dotted key of a dataclass."""
    owner: Any = config_class
    for name in key.split("."):
        owner = get_type_hints(owner)[name]
    return owner


def problem(hint: Any, value: Any) -> str:
    """`found ..., expected ...` of a value that does not have a type, with the name that is probably meant."""
    names = [str(name) for option in _options(hint) if get_origin(option) is Literal for name in get_args(option)]
    near = nearest(value, names) if isinstance(value, str) and names else ""
    if not near and float in _options(hint) and isinstance(value, str) and _is_number(value.replace(",", ".")):
        near = f", did you mean {value.replace(',', '.')}?"
    found = value if isinstance(value, str) and value else json.dumps(value, default=str)
    return f"found {found}, expected {expected(hint)}{near}"


def expected(hint: Any) -> str:
    """What a value of a type may be: `a whole number or null`."""
    options = _options(hint)
    texts = [_described(option) for option in options if option is not NoneType]
    return " or ".join(texts + ["null"] * (NoneType in options))


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; another type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _described(hint: Any) -> str:
    """One type in words."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list) and arguments:
        item = arguments[0]
        examples = [str(name) for name in get_args(item)] if get_origin(item) is Literal else EXAMPLES.get(item, ())
        is_fixed = origin is tuple and arguments[-1] is not Ellipsis
        size = f"a list of {len(arguments)}" if is_fixed else "a list"
        shown = f", such as [{', '.join(examples[:2])}]" if examples else ""
        return f"{size}, each {_described(item)}{shown}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return WORDS[dict]
    return "a section of keys" if is_dataclass(origin) else WORDS.get(origin, str(hint))


def _is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
