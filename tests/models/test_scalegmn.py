import dataclasses

import pytest
import torch

from scalegmn.engine import memory
from scalegmn.engine.chunks import ChunkPlan
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.symmetry.measure import assert_invariant


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("symmetry", ["sign", "permutation"])
def test_computing_only_what_is_read_changes_nothing(direction, symmetry, random_params):
    """A model that computes every node and edge in every layer gives the same output."""
    spec = NetSpec.mlp([2, 4, 5, 3, 2], "sine")
    torch.manual_seed(0)
    lean = ScaleGMNConfig(symmetry=symmetry, direction=direction, hidden_dim=5, normalize=False).build(spec).double()
    everything = dataclasses.replace(lean.config, readout="full_graph").build(spec).double()
    plain = {k: v for k, v in lean.state_dict().items() if not k.startswith("readout.") and ".factor." not in k}
    everything.load_state_dict(plain, strict=False)
    for ours, theirs in zip(lean.layers, everything.layers, strict=True):  # copy branches by role, not by position
        for module in ("forward_message.net", "backward_message.net", "update"):
            if symmetry == "permutation" or (direction == "forward" and module.startswith("backward")):
                continue
            a, b = (layer.get_submodule(f"{module}.layers.0.factor") for layer in (ours, theirs))
            for role, index in a.index.items():
                b.branches[b.index[role]].load_state_dict(a.branches[index].state_dict())
    everything.readout = lean.readout
    params = random_params(spec, 3)
    assert len(lean.needed[-1][0].nodes) < len(everything.needed[-1][0].nodes)
    torch.testing.assert_close(everything(params), lean(params), rtol=1e-12, atol=1e-12)


def test_dropout_only_in_training(random_params):
    spec = NetSpec.mlp([2, 4, 1], "sine")
    model = ScaleGMNConfig(hidden_dim=5, dropout=0.5).build(spec).double()
    params = random_params(spec, 3)
    assert not torch.equal(model(params), model(params))
    model.eval()
    assert torch.equal(model(params), model(params))


def test_contradictions_are_named_together():
    with pytest.raises(ValueError, match=r"hidden_dim: found 0.*dropout: found 1.5.*mlp_dims: found.*update.positions"):
        ScaleGMNConfig(
            hidden_dim=0,
            mlp_dims=(),
            dropout=1.5,
            node_positions="none",
            update=EquivariantNetConfig(positions=True),
        )


def test_sizes_are_for_vectors():
    with pytest.raises(ValueError, match=r"scalegmn_args.sizes: found True, but .*; use vector output or False"):
        ScaleGMNConfig(output="parameters", sizes=True)


def test_sizes_show_how_large_networks_are(random_params):
    """Of last layers times 10 the readout sees log10 + 1, in units of its deviation over the training networks."""
    spec = NetSpec.mlp([2, 5, 4, 3], "relu")
    model = ScaleGMNConfig(symmetry="scale", hidden_dim=4, sizes=True).build(spec).double()
    params = random_params(spec, 50)
    weights = (*params.weights[:2], params.weights[2] * 10 ** torch.linspace(-2, 2, 50)[:, None, None].double())
    model.fit_normalization([params.replace(weights=weights)])
    buffers = model.state_dict()
    deviation = buffers["statistics_normalization.deviations"][4]
    assert 1 < deviation < 1.5
    raised = params.replace(weights=(*params.weights[:2], 10 * params.weights[2]))
    change = [model.statistics_normalization(model.statistics(nets)) for nets in (params, raised)]
    expected = torch.zeros(6).double()
    expected[4] = 1 / deviation
    torch.testing.assert_close(change[1] - change[0], expected.expand(50, 6))


def test_named_values_are_checked_outside_the_command_line_too():
    with pytest.raises(ValueError, match=r"symmetry: found 'signs', expected one of .*; .*message.io: found 'none'"):
        ScaleGMNConfig(symmetry="signs", message=EquivariantNetConfig(io="none"))


def test_normalization_is_on_for_permutation_only():
    spec = NetSpec.mlp([2, 4, 1], "sine")
    assert ScaleGMNConfig(symmetry="permutation").build(spec).normalization is not None
    assert ScaleGMNConfig().build(spec).normalization is None
    assert ScaleGMNConfig(normalize=True).build(spec).normalization is not None


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "hetero"])
def test_trains_on_weights_of_all_sizes(kind, direction):
    """In float32, on weights from 1e-15 to 1e3 and exactly zero, as on ordinary ones: finite, and the loss falls."""
    generator = torch.Generator().manual_seed(0)
    symmetry = "hetero" if kind == "hetero" else "scale"
    spec = NetSpec.mlp([3, 8, 8, 2], "hetero" if kind == "hetero" else "relu")
    if kind == "cnn":
        spec = NetSpec((LayerSpec(1, 6, (3, 3), "relu"), LayerSpec(6, 8, (1, 1), "relu"), LayerSpec(8, 3)))

    def draw(*shape):
        sizes = 10 ** (18 * torch.rand(shape, generator=generator) - 15)
        kept = torch.rand(shape, generator=generator) > 0.1
        return sizes * kept * (2 * torch.randint(0, 2, shape, generator=generator) - 1)

    params = NetParams(
        spec,
        tuple(draw(16, *layer.weight_shape) for layer in spec.layers),
        tuple(draw(16, layer.out_dim) for layer in spec.layers),
        torch.tensor([1, 2] * 8) if kind == "hetero" else None,
    )
    params.weights[1][3] = 0  # a network that nothing passes through
    torch.manual_seed(0)
    config = ScaleGMNConfig(symmetry=symmetry, direction=direction, hidden_dim=16, out_dim=2, dropout=0.0)
    model = config.build(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = torch.arange(16) % 2
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(params), labels)
        optimizer.zero_grad()
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        assert norms.isfinite().all()
        assert norms.max() < 1e3
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_parts_and_pieces_follow_the_size(direction, dropout, random_params, monkeypatch):
    """Over budget the model works in pieces, with the same dropout when they are computed again."""
    spec = NetSpec.mlp([2, 9, 8, 2], "sine")
    config = ScaleGMNConfig(direction=direction, hidden_dim=4, mlp_dropout=dropout)
    model = config.build(spec).double().train()
    device = torch.device("cpu")
    assert model.chunks(100, device) == ChunkPlan()
    assert model.networks_at_once(device) > 100
    for module in ("scalegmn.engine.chunks", "scalegmn.engine.memory", "scalegmn.models.scalegmn.model"):
        monkeypatch.setattr(f"{module}.kept_bytes", lambda device: 10_000)
    monkeypatch.setitem(memory.TENSOR, "cpu", 2_000)
    assert model.chunks(5, device).num_edges == 1_000 // 32
    assert model.networks_at_once(torch.device("meta")) == 1  # other devices have a CPU's limits
    params = random_params(spec, 5)
    weight = model.layers[0].forward_message.edge_linear.weight

    def loss():
        torch.manual_seed(0)
        return model(params).square().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():
        weight += step
        above = loss()
        weight -= 2 * step
        below = loss()
    torch.testing.assert_close((gradient * step).sum() * 2, above - below, rtol=1e-5, atol=0)


def test_an_epsilon_leaves_bidirectional_models_exact(random_params, generator):
    spec = NetSpec.mlp([2, 8, 8, 2], "relu")
    torch.manual_seed(0)
    config = ScaleGMNConfig(symmetry="scale", direction="bidirectional", hidden_dim=6, norm_epsilon=1e-10)
    assert_invariant(config.build(spec).double(), random_params(spec, 6), generator)
