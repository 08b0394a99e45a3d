"""Real models in mixed precision, compiled, and in parts."""

from pathlib import Path

import pytest
import torch

from scalegmn.engine import native
from scalegmn.experiments.config import build_model, read_config_file
from scalegmn.models import ScaleGMNConfig
from scalegmn.networks import NetParams, NetSpec
from scalegmn.reporting.run_folder import Run
from scalegmn.symmetry.measure import invariance_error
from scalegmn.tasks.classification import Classification
from scalegmn.training.config import TrainConfig
from scalegmn.training.launch import launch
from scalegmn.training.optimization import OptimizationConfig
from scalegmn.training.precision import InPrecision
from scalegmn.training.trainer import Trainer
from scalegmn.zoos.loader import DataConfig
from scalegmn.zoos.zoo_format import Networks, write_zoo

ROOT = Path(__file__).parents[2]
PARTS = [
    ["num_layers=1"],
    ["num_layers=1", "direction=forward"],
    ["symmetry=scale"],
    ["symmetry=scale", "engine=plain"],
]
"""Of models that change parameters, whose nodes and edges may be of different types."""

KINDS = {"sign": "sine", "scale": "relu", "hetero": ("tanh", "relu", "relu") * 15}


def build(tmp_path, symmetry, direction="bidirectional", num_layers=2, **options):
    """A trainer on 15 networks per split, of three classes."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(45, *shape, generator=generator) / 2 for shape in ((5, 2), (4, 5), (1, 4))]
    biases = [torch.randn(45, size, generator=generator) / 3 for size in (5, 4, 1)]
    params = NetParams.from_tensors(weights, biases, KINDS[symmetry])
    splits = dict(zip(("train", "val", "test"), torch.arange(45).split(15), strict=True))
    if not (tmp_path / "zoo").exists():
        write_zoo(tmp_path / "zoo", [Networks((params,), {"label": torch.arange(45) % 3})], splits, {})
    sizes = {"hidden_dim": 16, "num_layers": num_layers, "out_dim": 3}
    model = ScaleGMNConfig(symmetry=symmetry, direction=direction, **sizes)
    task = Classification(DataConfig(str(tmp_path / "zoo")), 15, model)
    config = TrainConfig(device="cpu", num_epochs=2, **{"precision": "fp32", **options})
    torch.manual_seed(0)
    run = Run(tmp_path / "-".join(map(str, options.values())), "", {})
    fabric = launch(config.device, config.devices, config.precision)
    return Trainer(fabric, task, model.build(task.spec), config, OptimizationConfig(), run)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("symmetry", KINDS)
def test_training_in_bf16(tmp_path, symmetry, direction, generator, monkeypatch):
    """The inside is bfloat16, parameters and losses are float32; still invariant, and near to float32."""
    trainer = build(tmp_path, symmetry, direction, precision="bf16-mixed")
    types, inside = set(), trainer.model.layers[0].forward_message.node_linear
    inside.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    params = trainer.task.splits["test"].read(slice(None))
    exact = trainer.model.eval()(params)
    types.clear()
    before = trainer.model.node_linear.weight.detach().clone()
    outputs = InPrecision(trainer.model, trainer.fabric)(params)
    assert types == {torch.bfloat16}
    assert outputs.dtype == torch.float32
    spread = (exact - exact.mean(0)).square().mean().sqrt()
    with monkeypatch.context() as operation_by_operation:
        operation_by_operation.setattr(native, "library", lambda: None)
        plain = InPrecision(trainer.model, trainer.fabric)(params)
    assert 0 < (plain - exact).abs().max() < 0.3 * spread
    rms, rms_of_plain = ((z - exact).square().mean().sqrt() for z in (outputs, plain))
    assert 0 < rms < 1.25 * rms_of_plain  # compiled programs round as often as the operations that they replace
    trainer.train_epoch()
    assert not torch.equal(trainer.model.node_linear.weight, before)
    for parameter in trainer.model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()
    assert invariance_error(InPrecision(trainer.model, trainer.fabric), params, generator) < 1e-2


@pytest.mark.parametrize(
    "options", [{}, {"message_function": "product", "mlp_layer_norm": False}], ids=["norm", "silu"]
)
@pytest.mark.parametrize("width", [32, 48, 96])
def test_gradients_in_bf16(width, options):
    """Those of compiled programs are as near to single precision's as those of operations one by one; 32 and 96 fill
    tiles of bfloat16 numbers, 48 does not."""
    torch.manual_seed(0)
    spec = NetSpec.mlp([2, 7, 5, 1], "sine")
    weights = tuple(torch.randn(5, *layer.weight_shape) for layer in spec.layers)
    params = NetParams(spec, weights, tuple(torch.randn(5, layer.out_dim) for layer in spec.layers))
    model = ScaleGMNConfig(direction="bidirectional", hidden_dim=width, num_layers=2, init="balanced", **options).build(
        spec
    )
    inside = [p for name, p in model.named_parameters() if name.startswith("layers.")]

    def gradient(engine, precision):
        model.engine = engine
        output = InPrecision(model, launch("cpu", 1, precision))(params)
        found = torch.autograd.grad(output.square().mean(), inside, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    exact = gradient("fast", "fp32")
    errors = [(gradient(engine, "bf16-mixed") - exact).norm() / exact.norm() for engine in ("fast", "plain")]
    assert 0 < errors[0] < max(1.5 * errors[1], 0.02)


@pytest.mark.parametrize(
    ("conf", "settings"),
    [
        *((path.stem, []) for path in sorted((ROOT / "configs/digits_editing").glob("*.yml"))),
        *(("scalegmn_bidir", [f"scalegmn_args.{part}" for part in parts]) for parts in PARTS),
    ],
)
def test_changes_in_bf16(conf, settings):
    """Changed networks are of one type, single precision, whatever the layers of a model round to."""
    torch.manual_seed(0)
    spec = NetSpec.mlp([2, 12, 12, 1], "relu" if "scalegmn_args.symmetry=scale" in settings else "sine")
    weights = tuple(torch.randn(2, *layer.weight_shape) for layer in spec.layers)
    params = NetParams(spec, weights, tuple(torch.randn(2, layer.out_dim) for layer in spec.layers))
    model = build_model(ROOT / f"configs/digits_editing/{conf}.yml", settings, spec)
    changes = InPrecision(model, launch("cpu", 1, "bf16-mixed"))(params)
    assert {x.dtype for x in changes.tensors()} == {torch.float32}


def test_parts_leave_training_as_it_is(tmp_path):
    whole, parts = (build(tmp_path / name, "sign") for name in ("whole", "parts"))
    parts._max_micro_batch = 4
    for trainer in (whole, parts):
        trainer.train_epoch()
    assert parts.progress.loss == pytest.approx(whole.progress.loss, rel=1e-6)
    assert parts.progress.grad_norm == pytest.approx(whole.progress.grad_norm, rel=1e-5)
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("symmetry", ["sign", "hetero"])
def test_compiled_is_the_same(tmp_path, symmetry):
    plain, compiled = (build(tmp_path, symmetry, "forward", 1, compile=choice) for choice in (False, True))
    for trainer in (plain, compiled):
        trainer.train_epoch()
    assert compiled.progress.loss == pytest.approx(plain.progress.loss, rel=1e-5)
    assert compiled.progress.grad_norm == pytest.approx(plain.progress.grad_norm, rel=1e-4)


def test_precision_that_is_given_asks_nobody(tmp_path, monkeypatch):
    """Nor does a GPU: no library is compiled for the answer."""
    (tmp_path / "run.yml").write_text("model: scalegmn")
    monkeypatch.setattr(native, "library", lambda: pytest.fail("compiled"))
    assert read_config_file(tmp_path / "run.yml", ["train_args.precision=fp32"]).precision == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert read_config_file(tmp_path / "run.yml").precision == "fp32"


@pytest.mark.parametrize("is_faster", [True, False])
@pytest.mark.parametrize(
    ("settings", "gains"),
    [
        (["model=scalegmn"], True),
        (["model=scalegmn", "scalegmn_args.symmetry=scale"], False),
        (["model=scalegmn", "scalegmn_args.engine=plain"], False),
        (["model=scalegmn", "scalegmn_args.hidden_dim=48"], False),
        (["model=scalegmn", "scalegmn_args.mlp_activation=relu"], False),
        (["model=scalegmn", "scalegmn_args.mlp_dropout=0.1"], False),
        (["model=scalegmn", "train_args.compile=true"], False),
        (["model=mlp"], False),
    ],
)
def test_auto_asks_the_model(settings, gains, is_faster, tmp_path, monkeypatch):
    """Products in bfloat16 would make other models slower, and all on other processors."""
    monkeypatch.setattr(native, "multiplies_halves", lambda: is_faster)
    (tmp_path / "run.yml").write_text("train_args: {device: cpu}")
    expected = "bf16-mixed" if gains and is_faster else "fp32"
    assert read_config_file(tmp_path / "run.yml", settings).precision == expected
