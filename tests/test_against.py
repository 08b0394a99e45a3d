"""`benchmarks/against.py`: another implementation in turns with this one."""

import json
from pathlib import Path

import pytest
from commands import run_process

AGAINST = Path(__file__).parents[1] / "benchmarks" / "against.py"


@pytest.mark.slow
def test_against(tmp_path):
    """An implementation that sleeps is as slow as it sleeps; one that fails is named."""
    (tmp_path / "asleep.py").write_text(
        "import time\nfrom pause import SECONDS\nprint('hello')\n"
        "def build(row): return row['batch_size'] * SECONDS\n"
        "def step(state): time.sleep(state)\n"
    )
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pause.py").write_text("SECONDS = 0.005\n")
    words = (AGAINST, "digits_ng_gnn_64", "--rounds=1", "--out=figures.jsonl")
    result = run_process(*words, "--other=asleep.py", "--path", "lib", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.jsonl").read_text())
    assert 0 < figures["other_networks_per_second"] <= 200  # 64 networks in 0.32 s, or later
    expected = figures["networks_per_second"] / figures["other_networks_per_second"]
    assert figures["ratio"] == pytest.approx(expected)
    (tmp_path / "broken.py").write_text("def build(row): raise RuntimeError('no such model')\n")
    result = run_process(*words, "--other=broken.py", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.endswith("error: broken.py ended with exit code 1\n")
