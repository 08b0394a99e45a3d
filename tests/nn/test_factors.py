import pytest
import torch
from contract import build, error

from scalegmn.models.quasi_nfn import QuasiNFNConfig
from scalegmn.models.quasi_scalegmn import QuasiScaleGMNConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.nn.factors import NeuronFactors
from scalegmn.symmetry.groups import GroupElement

RELU = NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2)))
CONFIGS = [
    QuasiScaleGMNConfig(hidden_dim=6, num_layers=3, symmetry="scale"),
    QuasiNFNConfig(hidden_dims=(4, 3), readout_dim=16),
    QuasiNFNConfig(hidden_dims=(4, 3), output="parameters"),
]


@torch.no_grad()
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_factors_move_with_permutations_and_are_bounded(activation, random_params, generator):
    """They are the same for all signs; scales of six decades move them, but not out of their bounds."""
    params = random_params(NetSpec.mlp([2, 5, 4, 1], activation), 3)
    model = NeuronFactors(8, 6, 0.3).double()
    for linear in model.mlp.linears:
        linear.weight.mul_(10)
    element = GroupElement.sample(params, generator, decades=3.0)
    factors, moved = model(params), model(element.act(params))
    for x, y, order in zip(factors, moved, element.permutations, strict=False):
        assert ((y >= 0.7) & (y <= 1.3)).all()
        assert y.max() - y.min() > 0.5
        change = (y - x.gather(1, order[..., None].expand_as(x))).abs().max()
        assert change > 1e-2 if activation == "relu" else change < 1e-12


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.output}")
def test_models_keep_scales_up_to_epsilon(config, random_params, generator):
    """The output moves in proportion to epsilon; without factors not at all."""
    params, model = random_params(RELU, 6), build(config, RELU)
    element, moves = GroupElement.sample(params, generator, permute=False), []
    for model.factors.epsilon in (1e-3, 1e-4, 0):
        moves.append(error(model, params, element))
    assert 1e-5 < moves[0] < 0.1
    assert moves[0] / moves[1] == pytest.approx(10, rel=0.1)
    assert moves[2] <= 1e-9


@pytest.mark.parametrize(
    ("config", "without"), [(QuasiScaleGMNConfig, "scalegmn"), (QuasiNFNConfig, "monomial_nfn")], ids=["gmn", "nfn"]
)
def test_wrong_bounds_are_refused(config, without):
    for epsilon in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"epsilon: found {epsilon}, expected between 0 and 1; .* model {without}"):
            config(epsilon=epsilon)
