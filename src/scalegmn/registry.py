"""Things by name: a class or object registers itself, everything else reads the registry."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TypeVar

Item = TypeVar("Item")


class Registry(Mapping[str, Item]):
    """Name -> item, in the order of registration.

    The command line, its help, error messages, tables of the documentation and the contract tests read registries, so
    that a new item is one new file.

    Args:
        kind: what the items are, for messages: `activation`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, Item] = {}

    def register(self, name: str, item: Item) -> Item:
        """Adds an item and returns it.

        Raises:
            ValueError: another item has this name.
        """
        if name in self._items:
            raise ValueError(f"{self.kind}: {name!r} is registered already; choose another name")
        self._items[name] = item
        return item

    def find(self, name: str) -> Item | None:
        """The item of a name; None if there is none."""
        return self._items.get(name)

    def __getitem__(self, name: str) -> Item:
        item = self.find(name)
        if item is None:
            raise KeyError(self._unknown(name, self.kind))
        return item

    def require(self, name: str, setting: str | None = None) -> Item:
        """The item that a user names.

        Args:
            name: its name.
            setting: where the user names it, such as `data.dataset`; None: the registry's `kind`.

        Raises:
            ValueError: no item has this name; the message gives the known names, the nearest of them too.
        """
        item = self.find(name)
        if item is None:
            raise ValueError(self._unknown(name, setting or self.kind))
        return item

    def _unknown(self, name: str, where: str) -> str:
        near = difflib.get_close_matches(str(name), self._items, n=1)
        advice = f"; did you mean {near[0]}?" if near else ""
        return f"{where}: found {name!r}, expected one of {', '.join(self._items)}{advice}"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
