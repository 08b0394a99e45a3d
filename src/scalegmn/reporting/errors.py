"""Errors about input, printed in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns ValueError and OSError into one line on stderr and exit code 2, Ctrl-C into exit code 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is finished", file=sys.stderr)
        raise SystemExit(130) from None
