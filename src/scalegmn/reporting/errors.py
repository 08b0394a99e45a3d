"""Errors about input, and warnings, printed in one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns ValueError and OSError into one line on stderr and exit code 2, Ctrl-C into exit code 130; warnings of this
    package into one line on stderr. Who reads stdout may stop (`| head`): exit code 1, and nothing is said."""
    try:
        with warnings.catch_warnings():
            show = warnings.showwarning

            def print_own(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
                if category.__module__.startswith("scalegmn."):
                    print(f"note: {message}", file=sys.stderr)
                else:
                    show(message, category, *place, **more)

            warnings.showwarning = print_own
            yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is finished", file=sys.stderr)
        raise SystemExit(130) from None
