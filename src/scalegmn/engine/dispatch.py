"""Fast forms of modules, by the module's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Form = Callable[..., Any]


class FastForms:
    """A function per type of module, called as forms(module, ...), and a default for all other types.

    The type must match exactly: a subclass may compute something else, so it takes the default, the module's plain
    form.

    Args:
        default: what is called for modules of other types.
    """

    def __init__(self, default: Form) -> None:
        self.default = default
        self.forms: dict[type[nn.Module], Form] = {}

    def register(self, kind: type[nn.Module]) -> Callable[[Form], Form]:
        """A decorator: the function is the fast form of modules of this type."""

        def add(form: Form) -> Form:
            self.forms[kind] = form
            return form

        return add

    def __contains__(self, module: nn.Module) -> bool:
        return type(module) in self.forms

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """The module's fast form, or the default."""
        return self.forms.get(type(module), self.default)(module, *args)
