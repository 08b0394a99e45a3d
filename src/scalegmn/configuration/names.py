"""The known name nearest to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def nearest(key: str, known: Collection[str]) -> str:
    """`, did you mean ...?` with the known key nearest to an unknown one, by the whole or the last part; else empty."""
    last_parts = {name.rpartition(".")[2]: name for name in reversed(list(known))}  # the first of equal ones
    near = [last_parts[key]] if key in last_parts else difflib.get_close_matches(key, known, n=1)
    near = near or [
        last_parts[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(last_parts), n=1)
    ]
    return f", did you mean {near[0]}?" if near else ""
