"""Networks to test on."""

import pytest
import torch

from scalegmn.spec import LayerSpec, NetParams, NetSpec

pytest.register_assert_rewrite("contract")


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
