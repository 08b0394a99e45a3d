"""Modules of users, imported because a command or a configuration names them.

A module registers activations, metanetworks, datasets, tasks or image edits of its own when it is imported. It is named
as Python names it (`my_package.my_module`) or by its file (`folder/my_module.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

IMPORT_HELP = (
    "a module of your own (my_package.my_module, or a .py file) to import first, which registers models, tasks, ...; "
    "may be repeated; a run's configuration keeps it"
)
"""What `--help` says about `--import`."""

_FILES: dict[str, Path] = {}
"""Stem of each file that has been imported -> its absolute path."""


def import_extension(name: str, where: str) -> str:
    """Imports a module of the user, once.

    Args:
        name: `my_package.my_module`, or the path of a `.py` file.
        where: what names it, for messages: `--import`, or `RUN/config.yml: imports`.

    Returns:
        The name that finds it again from any folder: files get their absolute path.

    Raises:
        ValueError: there is no such module, or importing it fails.
    """
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return name
        return str(_import_file(Path(name).expanduser().resolve()))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except Exception as error:  # whatever the user's code leads to
        reason = f"{type(error).__name__}: {error}"
        remedy = "; run the command where it can be found, or set PYTHONPATH" if _is_missing(name, error) else ""
        raise ValueError(f"{where}: the module {name} cannot be imported ({reason}){remedy}") from None


def _import_file(path: Path) -> Path:
    """Imports a file under the name `scalegmn_import_<stem>`; returns the path that it has been imported from.

    A file that is missing counts as imported when another one of its name has been: `--import` may say where it is now.
    """
    known = _FILES.get(path.stem)
    if known is not None and (known == path or not path.exists()):
        return known
    if known is not None:
        raise ValueError(f"{path}: another file of this name has been imported ({known}); rename one of them")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; say with --import where {path.name} is now")
    module_name = f"scalegmn_import_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look up their module while it is imported
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    _FILES[path.stem] = path
    return path


def _is_missing(name: str, error: Exception) -> bool:
    """Whether an import failed because the module itself, or a package around it, was not there."""
    return isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}.")
