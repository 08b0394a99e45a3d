"""torch.compile: each model becomes one graph without breaks, with the same outputs and gradients.

Tracing by Dynamo (`eager`) finds breaks and wrong numbers; tracing the backward pass too (`aot_eager`) takes longer.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from contract import flat

from scalegmn.models.dwsnet import DWSNetConfig
from scalegmn.models.nfn import NFNConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import BUILT_IN, NetSpec

SCALEGMN = ScaleGMNConfig(direction="bidirectional", num_layers=2, hidden_dim=4, normalize=False)
SPECS = {"scale": "relu", "hetero": "hetero"}
CONFIGS = {symmetry: replace(SCALEGMN, symmetry=symmetry) for symmetry in ("sign", "scale", "hetero", "permutation")}
CONFIGS |= {
    "dwsnet": DWSNetConfig(hidden_dim=4, num_hidden=1, num_heads=2),
    "nfn": NFNConfig(hidden_dims=(4,), num_frequencies=2),
    "ng_gnn": NGGNNConfig(hidden_dim=4, num_layers=1, normalize=False),
    "ng_t": NGTConfig(node_dim=4, edge_dim=4, attention_dim=4, num_heads=2, num_layers=1, normalize=False),
}


PER_COMMIT = {("sign", "vector", "eager"), ("nfn", "parameters", "eager"), ("ng_gnn", "vector", "eager")}
"""`make test-slow` has all models with both outputs, and their backward passes."""
CASES = sorted(PER_COMMIT | set(product(CONFIGS, ["vector", "parameters"], ["aot_eager"])))


@pytest.mark.parametrize(
    ("name", "output", "backend"),
    [pytest.param(*case, marks=() if case in PER_COMMIT else pytest.mark.slow) for case in CASES],
)
def test_one_graph(name, output, backend, random_params):
    spec = NetSpec.mlp([2, 4, 3, 1], SPECS.get(name, "sine"))
    torch.manual_seed(0)
    model = replace(CONFIGS[name], output=output).build(spec).double().eval()
    own = [BUILT_IN.index(activation) for activation in ("tanh", "relu", "tanh")] if name == "hetero" else None
    params = random_params(spec, 3, own)

    def results(call):
        output = flat(call(params))
        return [output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))]

    torch._dynamo.reset()
    found = results(torch.compile(model, fullgraph=True, backend=backend))
    torch._dynamo.reset()
    for compiled, expected in zip(found, results(model), strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-10, atol=1e-12)
