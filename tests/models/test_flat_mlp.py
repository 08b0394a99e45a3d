import pytest
from contract import Contract

from scalegmn.models import FlatMLPConfig
from scalegmn.spec import LayerSpec, NetSpec

SPECS = [
    NetSpec.mlp([2, 5, 4, 2], "sine", 6.0),
    NetSpec((LayerSpec(1, 3, (3, 3), "hetero"), LayerSpec(3, 4, (3, 1), "hetero"), LayerSpec(4, 2))),
]
CONFIGS = [
    FlatMLPConfig(hidden_dim=16, num_hidden=2),
    FlatMLPConfig(hidden_dim=16, num_hidden=2, batch_norm=False, normalize=False, out_dim=1),
    FlatMLPConfig(hidden_dim=16, num_hidden=2, output="parameters"),
]


class TestFlatMLP(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (FlatMLPConfig(), 42_762),
        (FlatMLPConfig(hidden_dim=1000, num_hidden=1, batch_norm=False), 2_197_010),
        (FlatMLPConfig(hidden_dim=1000, num_hidden=2, batch_norm=False, output="parameters"), 4_374_191),
    ],
)
def test_published_parameter_counts(config, count):
    model = config.build(NetSpec.mlp([2, 32, 32, 1], "sine"))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_wrong_numbers_are_named_together():
    with pytest.raises(ValueError, match=r"mlp_args.hidden_dim: found 0, .*; mlp_args.dropout: found 1, expected a"):
        FlatMLPConfig(hidden_dim=0, dropout=1)
