"""`benchmarks/gpu.py`, on a CPU and small."""

import json
from pathlib import Path

import pytest
import torch
from commands import run_process

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_gpu_benchmark(tmp_path):
    """It measures correctness, steps and a training run, and writes them as JSON and as tables; errors stay visible."""
    run = ("--views=1", "--epochs=1", "--accuracy=0.05")
    steps = ("--cases", "mlp", "statnn", "--compiled_cases", "--batch_sizes", "4", "--rounds=1")
    result = run_process(GPU, "--device=cpu", *steps, *run, "--out=found", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found" / "gpu.json").read_text())
    assert len(found["golden outputs"]) == 24
    assert max(row["float64"] for row in found["golden outputs"]) < 1e-9
    errors = {row["case"]: row["float64"] for row in found["symmetry"]}
    assert errors.pop("mlp") > 0.1
    assert max(errors.values()) < 1e-9
    assert [row["epochs"] for row in found["training"]] == [1]
    assert {(row["case"], row["precision"]) for row in found["training steps"]} == {
        (case, precision) for case in ("mlp", "statnn") for precision in ("fp32", "bf16")
    }
    assert all(row["operators"] > 0 and row["networks_per_second"] > 0 for row in found["training steps"])
    table = (tmp_path / "found" / "gpu.md").read_text()
    assert all(f"## {name}" in table for name in found)
    if torch.cuda.is_available():
        return
    result = run_process(GPU, cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2,
        "gpu.py: error: --device: found no CUDA device; use --device cpu",
    )
