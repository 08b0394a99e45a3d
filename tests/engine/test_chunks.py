import pytest
import torch
from memory import bytes_kept

from scalegmn.engine import native
from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.edges import EdgeIndex
from scalegmn.engine.rows import Rows
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import NetSpec

SPEC = NetSpec.mlp([2, 12, 10, 2], "sine")
WAYS = [ChunkPlan(30), ChunkPlan(30, materialize=False)]


def in_pieces(model, monkeypatch, pieces):
    monkeypatch.setattr(model, "chunks", lambda *args: pieces)


def bidirectional():
    torch.manual_seed(0)
    return ScaleGMNConfig(direction="bidirectional", hidden_dim=8).build(SPEC)


@pytest.mark.parametrize("pieces", WAYS)
def test_in_mixed_precision(pieces, random_params, monkeypatch):
    """What autocast does in the forward pass, it does when pieces are computed again."""
    model, params = bidirectional(), random_params(SPEC, 3).to(torch.float32)

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(params).float().square().sum()
            return torch.autograd.grad(loss, list(model.parameters()))

    whole = gradients()
    in_pieces(model, monkeypatch, pieces)
    for found, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("part", ["edge_update", "node_linear", "branches.0", "branches.1"])
@pytest.mark.parametrize("pieces", WAYS)
def test_gradients_of_what_needs_them_alone(pieces, part, raw, random_params, monkeypatch):
    """Some parameters are frozen, and the raw features of the networks may need gradients."""
    model, params = bidirectional().double(), random_params(SPEC, 3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert learned
    if raw:
        learned += [weight.requires_grad_() for weight in params.weights]

    def gradients():
        return torch.autograd.grad(model(params).square().sum(), learned)

    whole = gradients()
    in_pieces(model, monkeypatch, pieces)
    torch.testing.assert_close(gradients(), whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("pieces", "share"), list(zip(WAYS, (0.2, 0.05), strict=True)))
def test_keeps_little_for_the_backward_pass(pieces, share, random_params, monkeypatch):
    """Of what it would keep at once, operation by operation: inputs and nodes, and updated features if so told."""
    spec = NetSpec.mlp([2, 64, 64, 2], "sine")
    model, params = ScaleGMNConfig(hidden_dim=32).build(spec), random_params(spec, 1).to(torch.float32)
    with monkeypatch.context() as operation_by_operation:
        operation_by_operation.setattr(native, "library", lambda: None)
        whole = bytes_kept(model, params)
    in_pieces(model, monkeypatch, pieces)
    assert bytes_kept(model, params) < share * whole


@pytest.mark.parametrize("num_edges", [1, 2, 5, 9, 50])
@pytest.mark.parametrize("receivers", [[], [0] + [1] * 9, [1] * 4 + [3] * 2 + [4]])
def test_sparse_parts_hold_each_edge_and_receiver_once(receivers, num_edges):
    """Receivers without edges are in some part; no part but an only one is empty."""
    index = torch.tensor(receivers, dtype=torch.long)
    parts = EdgeIndex(index, index, index, num_receivers=6, rows=Rows("hidden", ())).parts(num_edges)
    edges, rows, pieces = zip(*parts, strict=True)
    assert torch.cat([torch.arange(20)[some] for some in edges]).tolist() == list(range(len(receivers)))
    assert torch.cat([torch.arange(20)[some] for some in rows]).tolist() == list(range(6))
    assert all(piece.num_edges for piece in pieces) or len(pieces) == 1
    for some, piece in zip(rows, pieces, strict=True):
        assert piece.num_receivers == some.stop - some.start
        assert piece.num_edges == 0 or piece.receiver.max() < piece.num_receivers
