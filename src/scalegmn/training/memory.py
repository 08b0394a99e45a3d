"""Memory of the process: what the C library keeps, what is collected, and the peak."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


def keep_freed_memory() -> None:
    """Makes the C library (glibc) keep freed memory for the next step.

    By default glibc returns it to the system at the end of each backward pass, and every page must be mapped and
    cleared again, which takes a third of a training step on a CPU. Blocks of 8 MB and more are still returned: they
    would leave holes that nothing else fits. The tensors of micro-batches and of chunks of a large network are smaller
    (`scalegmn.engine`). Other C libraries are not changed.
    """
    settings = {-1: 2**31 - 1, -2: 2**24, -3: 2**23}  # trim threshold, top pad, mmap threshold
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        for name, value in settings.items():
            libc.mallopt(name, value)


@contextmanager
def present_objects_frozen() -> Iterator[None]:
    """Exempts all objects that are there from Python's garbage collection: looking through those of libraries and of
    the model takes a tenth of the time of small training steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: torch's on a GPU, the whole process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
