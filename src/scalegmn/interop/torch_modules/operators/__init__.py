"""Operators of networks, a file per family. A new operator is one function, registered by its names."""

import importlib

from scalegmn.interop.torch_modules.operators.registry import OPERATORS, Call, Operator, operator

_FAMILIES = (
    *("views", "linear", "norms", "activations", "arithmetic", "concatenation", "pooling", "attention"),
    "recurrent",
)
for _family in _FAMILIES:
    importlib.import_module(f"{__name__}.{_family}")

__all__ = ["OPERATORS", "Call", "Operator", "operator"]
