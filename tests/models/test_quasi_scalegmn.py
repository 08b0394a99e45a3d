import pytest
from contract import EngineContract

from scalegmn.models.quasi_scalegmn import QuasiScaleGMNConfig
from scalegmn.networks import LayerSpec, NetSpec

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
