"""Configuration files: where they are found, and what they hold."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from scalegmn.configuration.text import read_text

SHIPPED = "configs"
"""The folder of the configurations that come with scalegmn; a path may start with it or leave it out."""


def shipped_configs() -> Path:
    """The folder of the configurations that come with scalegmn: in the installed package, or in the source tree."""
    package = Path(__file__).parents[1]
    installed = package / SHIPPED
    return installed if installed.is_dir() else package.parents[1] / SHIPPED


def find_config(name: str | Path) -> Path:
    """The configuration file that a path names: from the current folder, or among those that come with scalegmn.

    Args:
        name: a path, such as `my.yml`, `configs/digits_cls/scalegmn.yml` or `digits_cls/scalegmn.yml`.

    Raises:
        ValueError: neither place has such a file; names both and the nearest file; or the name is a folder's.
    """
    path, shipped = Path(name), shipped_configs()
    if path.is_file():
        return path
    inside = Path(*path.parts[1:]) if path.parts[:1] == (SHIPPED,) else path
    if not path.is_absolute() and (shipped / inside).is_file():
        return shipped / inside
    if path.is_dir():
        raise ValueError(f"--conf {name}: found a folder, expected a YAML file")
    start = f"{SHIPPED}/" if path.parts[:1] == (SHIPPED,) else ""
    known = {*map(str, Path().glob(f"{SHIPPED}/*/*.yml"))}
    known |= {start + file.relative_to(shipped).as_posix() for file in shipped.glob("*/*.yml")}
    near = difflib.get_close_matches(str(name), sorted(known), n=1)
    places = f"neither in {Path.cwd()} nor among the configurations of scalegmn ({shipped})"
    where = path.parent if path.is_absolute() else places
    raise ValueError(
        f"--conf {name}: no such file" + (f"; did you mean {near[0]}?" if near else "") + f" (searched: {where})"
    )


def read_yaml(name: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or `.json` file of settings, found by `find_config`; raises ValueError with its name."""
    file = find_config(name)
    kind = "JSON" if file.suffix == ".json" else "YAML"
    try:
        text = read_text(file)
        content = json.loads(text) if kind == "JSON" else yaml.safe_load(text)  # 1e-5 is no number in YAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--conf {name}: not {kind} ({_reason(error)}); correct it") from None
    if content is None:
        raise ValueError(f"--conf {name}: found no settings, expected keys and values; leave it out for all defaults")
    if not isinstance(content, dict):
        raise ValueError(f"--conf {name}: found a {type(content).__name__}, expected keys and values")
    return content


def _reason(error: Exception) -> str:
    """Why a file could not be read, with the line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}: {error.msg}"
    return "no text" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())


def leaves(content: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; the mappings named in `whole` stay together."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in whole:
            yield from leaves(value, f"{prefix}{key}.", whole)
        else:
            yield f"{prefix}{key}", value
