from dataclasses import replace

import pytest
from contract import EngineContract, build, error

from scalegmn.models.quasi_scalegmn import QuasiScaleGMNConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.symmetry.groups import GroupElement

RELU = NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2)))
SIREN = NetSpec.mlp([2, 5, 4, 1], "sine", 6.0)
SMALL = {"hidden_dim": 6, "num_layers": 3}
CASES = [
    (QuasiScaleGMNConfig(**SMALL), SIREN),
    (QuasiScaleGMNConfig(**SMALL, num_probes=3, direction="bidirectional", output="parameters", heads=2), SIREN),
    (QuasiScaleGMNConfig(**SMALL, symmetry="scale"), RELU),
    (QuasiScaleGMNConfig(**SMALL, symmetry="hetero", readout="full_graph"), NetSpec.mlp([3, 4, 2], "hetero")),
]


class TestQuasiScaleGMN(EngineContract):
    @pytest.fixture(params=CASES, ids=str)
    def case(self, request):
        return request.param


def test_scales_are_kept_up_to_epsilon(random_params, generator):
    """The output moves in proportion to epsilon; without factors not at all."""
    config, spec = CASES[2]
    params = random_params(spec, 6)
    element = GroupElement.sample(params, generator, permute=False)
    model, moves = build(config, spec), []
    for epsilon in (1e-3, 1e-4, 0):
        model.config = replace(config, epsilon=epsilon) if epsilon else config
        if not epsilon:
            model.added_features = lambda nets, read, probes: probes
        moves.append(error(model, params, element))
    assert 1e-5 < moves[0] < 0.1
    assert moves[0] / moves[1] == pytest.approx(10, rel=0.1)
    assert moves[2] <= 1e-9


def test_wrong_factors_are_refused():
    for epsilon in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"quasi_scalegmn_args.epsilon: found {epsilon}, expected between 0 and 1"):
            QuasiScaleGMNConfig(epsilon=epsilon)
