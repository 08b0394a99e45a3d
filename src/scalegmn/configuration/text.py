"""Text files that people write."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark, or in UTF-16 with one, as Windows writes them.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text, which is a ValueError.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    is_utf16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return path.read_text(encoding="utf-16" if is_utf16 else "utf-8-sig")
