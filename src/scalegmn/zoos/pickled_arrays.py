"""Dictionaries and arrays in a pickle, without running its code."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _Refused(ValueError):
    """A pickle holds what is not read."""


class _Type:
    """Stands in for `numpy.dtype`; keeps the type's name."""

    kind: object = None

    def __init__(self, kind: object = None, *_: object) -> None:
        self.kind = kind

    def __setstate__(self, state: object) -> None:
        """The byte order, which bytes do not have."""


class _Array:
    """Stands in for `numpy.ndarray`; its state becomes an array of bytes."""

    values: NDArray[np.uint8] | None = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Version, shape, type, Fortran order, bytes."""
        _, shape, dtype, fortran, content = state
        content = content.encode("latin-1") if isinstance(content, str) else content
        if dtype.kind != "u1" or len(content) != int(np.prod(shape, dtype=object)):
            raise _Refused(
                f"array of {dtype.kind}, shape {shape}, {len(content):,} bytes, expected one byte per number (u1)"
            )
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
}
"""Module and name -> stand-in."""


class _Unpickler(pickle.Unpickler):
    """Knows three names, those that pickled arrays need, and gives stand-ins for them: nothing of numpy is called."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a known name.

        Raises:
            ValueError: the name is not known.
        """
        if (module, name) not in _STAND_INS:
            raise _Refused(f"refused: holds {module}.{name}, which lists and arrays do not need")
        return _STAND_INS[module, name]


def read_pickle(content: bytes) -> Any:
    """The content of a pickle of plain values, lists, and dictionaries whose values may be arrays of bytes.

    No name that the pickle holds is imported or called (`_Unpickler`). Strings of bytes become latin-1 text.

    Raises:
        ValueError: the pickle is damaged, or holds another class, function or type of array; names it.
    """
    try:
        result = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _Refused:
        raise
    except Exception as error:  # whatever a hostile or broken pickle leads to
        reason = " ".join(str(error).split())
        raise ValueError(f"not a readable pickle: {type(error).__name__} {reason}") from None
    if not isinstance(result, dict):
        return result
    return {key: value.values if isinstance(value, _Array) else value for key, value in result.items()}
