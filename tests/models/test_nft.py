import pytest
import torch
from contract import Contract, build

from scalegmn.models.nft import Attention, NFTConfig
from scalegmn.networks import LayerSpec, NetSpec

SPECS = [
    NetSpec.mlp([2, 5, 4, 1], "sine", 6.0),
    NetSpec.mlp([3, 4, 2], "hetero"),
    NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2))),
]
SMALL = {"hidden_dim": 8, "num_heads": 2, "num_layers": 2}
CONFIGS = [
    NFTConfig(**SMALL, num_latents=3, readout_dim=16, dropout=0.1),
    NFTConfig(**SMALL, output="parameters", heads=2, normalize=False),
]


class TestNFT(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


def test_attention_is_that_of_the_equations():
    """One head and one token after the other."""
    torch.manual_seed(0)
    attention, tokens = Attention(6, 2).double(), torch.randn(1, 4, 3, 6, dtype=torch.float64)
    q, k, v = (
        linear(tokens)[0].unflatten(-1, (2, 3)) for linear in (attention.queries, attention.keys, attention.values)
    )
    expected = torch.zeros(4, 3, 2, 3, dtype=torch.float64)
    for head in range(2):
        for reader in range(4):
            scores = torch.stack(
                [(q[reader, :, head] * k[read, :, head]).sum() / 3 for read in range(4)]
            )  # sqrt(3 * 3)
            for share, read in zip(scores.softmax(0), range(4), strict=True):
                expected[reader, :, head] += share * v[read, :, head]
    torch.testing.assert_close(attention(tokens, tokens)[0], attention.last(expected.flatten(-2)))


def test_networks_without_hidden_layers_are_read(random_params):
    spec = NetSpec.mlp([3, 2], "sine")
    assert build(CONFIGS[0], spec)(random_params(spec, 2)).shape == (2, 10)


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"nft_args.hidden_dim: found 0, expected at least 1"):
        NFTConfig(hidden_dim=0)
    with pytest.raises(ValueError, match=r"nft_args.num_heads: found 5, expected a divisor of hidden_dim, 64"):
        NFTConfig(num_heads=5)
    residual = NetSpec((LayerSpec(2, 3, None, "tanh"), LayerSpec(3, 3, None, "tanh", residual=0), LayerSpec(3, 1)))
    with pytest.raises(ValueError, match="nft knows of no residual connections"):
        NFTConfig().build(residual)
