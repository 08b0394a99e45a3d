"""The page of `scalegmn explore`: one file without links, that opens from the disk."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from scalegmn.explore.content import PARAMETER_BYTES, Collection
from scalegmn.reporting.words import counted

MARK = '<meta name="generator" content="scalegmn.explore">'
"""Tells a page from another file, which is never overwritten."""

LARGEST = 15 * 10**6
"""Bytes of a page, at most."""


def page(collections: Sequence[Collection]) -> str:
    """The HTML of the page.

    Everything that users name is JSON in a block that is never executed, and reaches the document as text. A policy
    forbids requests, and all scripts but the page's own.

    Raises:
        ValueError: the page would be larger than `LARGEST`.
    """
    folder = resources.files(__package__)
    script, style = (folder.joinpath(name).read_text() for name in ("page.js", "page.css"))
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(folder.joinpath("page.html.jinja").read_text())
    share = PARAMETER_BYTES // len(collections)
    text = template.render(
        mark=MARK,
        title=", ".join(collection.name for collection in collections),
        script=script,
        script_sha256=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=resources.files("scalegmn.reporting").joinpath("look.css").read_text() + style,
        data=embedded({"collections": [collection.content(share) for collection in collections]}),
    )
    if len(text) > LARGEST:
        number = counted(sum(len(collection.names) for collection in collections), "network")
        raise ValueError(f"the page of {number} has {len(text):,} bytes, expected at most {LARGEST:,}; name fewer zoos")
    return text


def embedded(content: dict[str, Any]) -> str:
    """JSON that cannot end the block in which it stands, nor begin another one."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
