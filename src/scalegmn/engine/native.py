"""The library that the C++ files here become: compiled when it is first needed, and kept for later processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_NAMES = (
    "products.h",
    "row_programs.cpp",
    "siren_fit.cpp",
    "coordinate_steps.h",
    "relu_classifiers.h",
    "inner_training.cpp",
    "graph_norms.cpp",
)
SOURCES = [Path(__file__).with_name(name) for name in _NAMES]

_FLAGS = (
    "-O3",
    "-march=native",
    *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []),
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-w",
)


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where it cannot be compiled (said once, on stderr) or SCALEGMN_NATIVE is 0."""
    if os.environ.get("SCALEGMN_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        _say("found no C++ compiler; install g++ or set CXX")
        return None
    try:
        file = _compiled(compiler)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        _say(f"{compiler} failed: {' '.join(error.stderr.split())[:300]}")
    except OSError as error:
        _say(str(error))
    return None


def has_library_for(*tensors: Tensor) -> bool:
    """Whether there is a library for these tensors: in single precision, on a CPU."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and library() is not None


def words(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Whole numbers and addresses, as the library's functions read them."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def multiplies_halves() -> bool:
    """Whether the processor multiplies bfloat16 numbers, and the library makes use of it."""
    lib = library()
    return lib is not None and bool(lib.multiplies_halves())


def _compiled(compiler: str) -> Path:
    """The library's file, compiled if there is none of this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [*(file.read_text() for file in SOURCES), version, *_FLAGS, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalegmn"
    file = folder / f"operations_{key}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / file.name
            command = [compiler, *_FLAGS, "-o", str(made), *(str(file) for file in SOURCES if file.suffix == ".cpp")]
            subprocess.run(command, capture_output=True, text=True, check=True)
            made.replace(file)  # whole, whoever else compiles it at the same time
    return file


def _processor() -> str:
    """What -march=native stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _say(problem: str) -> None:
    print(f"note: training on a CPU is slower without compiled operations: {problem}", file=sys.stderr)
