"""Networks to test on."""

import gc
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.zoos.zoo_format import Networks, write_zoo

pytest.register_assert_rewrite("commands", "contract")


def pytest_collection_finish():
    """Leaves what is there before the first test, some 700,000 objects, out of all later collections of garbage."""
    gc.freeze()


def pytest_runtest_setup(item):
    """Skips tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def random_params(generator):
    """random_params(spec, B): float64 networks with standard normal parameters; mixed specs cycle activations."""

    def make(spec: NetSpec, num_networks: int, activation: list[int] | None = None) -> NetParams:
        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        return NetParams(
            spec,
            tuple(draw(num_networks, *layer.weight_shape) for layer in spec.layers),
            tuple(draw(num_networks, layer.out_dim) for layer in spec.layers),
            None if activation is None else torch.tensor(activation),
        )

    return make


@pytest.fixture
def drawn(monkeypatch):
    """Name of a PNG -> the figure that this process saved there, or in memory (`None`)."""
    figures, save = {}, Figure.savefig

    def savefig(figure, file, **options):
        figures[getattr(file, "name", None)] = figure
        save(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.fixture
def cnn_spec():
    """Kernels 3x3, 1x1 and 5x3, then a linear layer."""
    return NetSpec(
        (
            LayerSpec(1, 4, (3, 3), "relu"),
            LayerSpec(4, 3, (1, 1), "relu"),
            LayerSpec(3, 5, (5, 3), "relu"),
            LayerSpec(5, 2),
        )
    )


@pytest.fixture(scope="session")
def small_home(tmp_path_factory):
    """A folder with a zoo of 48 random sine networks of 3 classes, and `conf.yml` to train a small model on it."""
    home = tmp_path_factory.mktemp("home")
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(48, *shape, generator=draw) for shape in ((6, 2), (1, 6))]
    biases = [torch.randn(48, size, generator=draw) for size in (6, 1)]
    label = torch.arange(48) % 3
    splits = {"train": torch.arange(24), "val": torch.arange(24, 36), "test": torch.arange(36, 48)}
    params = NetParams.from_tensors(weights, biases, "sine", w0=6.0)
    write_zoo(home / "data" / "zoo", [Networks((params,), {"label": label})], splits, {})
    (home / "conf.yml").write_text(
        "data: {dataset_path: data/zoo}\nbatch_size: 8\ntrain_args: {num_epochs: 1}\n"
        "scalegmn_args: {hidden_dim: 8, num_layers: 2, out_dim: 3}\n"
    )
    (home / "inr_classification.py").symlink_to(Path(__file__).parents[1] / "inr_classification.py")
    return home
