"""Low-rank adapters in files, as peft writes them."""

from pathlib import Path

import pytest
import torch
from commands import run_command, run_here
from safetensors.torch import save_file

import scalegmn
from scalegmn.interop.network_files import InputOptions, read_source
from scalegmn.interop.state_dicts import read_network
from scalegmn.models.mvprobe import MVProbeConfig
from scalegmn.networks import linear_products

SHAPES = {"layers.10.q_proj": (6, 2, 5), "layers.9.q_proj": (7, 3, 4)}


def adapter(seed=0, names=SHAPES, middle=""):
    torch.manual_seed(seed)
    state = {}
    for name in names:
        in_dim, rank, out_dim = SHAPES[name]
        for part, shape in (("A", (rank, in_dim)), ("B", (out_dim, rank))):
            state[f"base_model.model.{name}.lora_{part}{middle}.weight"] = torch.randn(shape)
    return state


def test_factors_of_all_layers(tmp_path):
    state = adapter() | {"base_model.model.head.weight": torch.randn(3, 5)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    params, notes = read_source(str(tmp_path / "adapter_model.safetensors"), InputOptions(None, 30.0))
    read = "base_model.model.layers.9.q_proj, base_model.model.layers.10.q_proj"
    assert notes == (
        f"a low-rank adapter, read as W = B A of {read}; lora_alpha / r, which multiplies W, is left out",
        "not read: base_model.model.head.weight",
    )
    assert linear_products(params.spec) == ((0, 1), (2, 3))
    expected = [
        state[f"base_model.model.layers.{layer}.q_proj.lora_{part}.weight"] for layer in (9, 10) for part in "AB"
    ]
    assert all(torch.equal(weight[0], stored) for weight, stored in zip(params.weights, expected, strict=True))
    assert len(params.spec.permutation_classes) == 2  # the rank channels of each; nothing else is free
    assert sum(coupled.num_channels for coupled in params.spec.permutation_classes) == 5
    moved = scalegmn.NetParams(params.spec, tuple(2 * weight for weight in params.weights), params.biases)
    written = read_network(tmp_path / "adapter_model.safetensors").with_parameters(moved)
    assert {key: (written[key] == 2 * value).all().item() for key, value in adapter().items()} == dict.fromkeys(
        adapter(), True
    )
    assert MVProbeConfig(num_probes=3, projection_dim=2).build(params.spec)(params).shape == (1, 10)


def test_a_modules_own_names_and_chosen_layers():
    params = scalegmn.from_state_dict(adapter(middle=".default"), "relu")
    one = scalegmn.from_state_dict(adapter(), "relu", layers=["base_model.model.layers.10.q_proj"])
    assert torch.equal(one.weights[0], params.weights[2])
    assert str(one.spec) == "MLP [6, 2, 5] (identity)"
    with pytest.raises(ValueError, match=r"layers: found q_proj, expected some of base_model.model.layers.10.q_proj, "):
        scalegmn.from_state_dict(adapter(), "relu", layers=["q_proj"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m.lora_A.weight": torch.ones(2, 3)}, r"m: found low-rank factors \{'A': \[2, 3\]\}, expected matrices A"),
        (
            {"m.lora_A.weight": torch.ones(2, 3, 3, 3), "m.lora_B.weight": torch.ones(4, 2, 1, 1)},
            r"m: found low-rank factors .* expected matrices A \[r, in\] and B \[out, r\]",
        ),
        ({"m.lora_A.weight": torch.ones(2, 3), "m.lora_B.weight": torch.ones(4, 3)}, "m: A has rank 2, but B has 3"),
        ({"m.lora_A.one.weight": torch.ones(2, 3), "m.lora_A.two.weight": torch.ones(2, 3)}, "a second adapter of m"),
        ({"m.lora_A.weight": torch.full((2, 3), torch.nan), "m.lora_B.weight": torch.ones(4, 2)}, "m.lora_A has NaN"),
        ({"m.base_layer.weight": torch.ones(4, 3)}, "a layer beside others, .*from_module"),
    ],
)
def test_what_is_no_adapter_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scalegmn.from_state_dict(adapter() | change, "relu")


def test_a_zoo_of_adapters(tmp_path, monkeypatch, capsys):
    """A folder per adapter, as peft saves them; without --activation."""
    lines = ["name,label"]
    for seed in range(6):
        (tmp_path / f"nets/{seed}").mkdir(parents=True)
        save_file(adapter(seed), tmp_path / f"nets/{seed}/adapter_model.safetensors")
        (tmp_path / f"nets/{seed}/adapter_config.json").write_text("{}")
        lines.append(f"{seed}/adapter_model,{seed % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    words = ["zoo", "import", "nets", "--labels", "labels.csv", "--out", "zoo"]
    code, output, error = run_command(words, tmp_path, monkeypatch, capsys)
    assert code == 0, error
    assert "6 networks" in output
    assert "read as W = B A of" in error
    assert ".json" in error  # what was passed over


@pytest.mark.slow
def test_the_script_that_makes_adapters(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "digits_adapters.py"
    result = run_here(script, "--out=made", "--num=20", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = (tmp_path / "made/labels.csv").read_text().split()
    assert [sum(row.endswith(split) for row in rows) for split in ("train", "val", "test")] == [12, 2, 6]
    params, _ = read_source(str(tmp_path / "made/00007.safetensors"), InputOptions(None, 30.0))
    assert params.spec.layout == (64, 4, 32, 32, 4, 64)
