"""Recurrent layers, cells in loops, and layers that are used at several places."""

import pytest
import torch
from readings import assert_read, outputs
from torch import nn

from scalegmn.interop.torch_modules import from_module
from scalegmn.models import NGGNNConfig, ScaleGMNConfig
from scalegmn.networks import NetParams
from scalegmn.symmetry.measure import assert_invariant

SIZE = 6


class Recurrent(nn.Module):
    """A recurrent layer and a linear one, which reads all its states."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(3, SIZE, batch_first=True, **options)
        self.last = nn.Linear(SIZE * (2 if self.layer.bidirectional else 1), 2)

    def forward(self, x):
        return self.last(self.layer(x)[0])


class Loop(nn.Module):
    """A cell in a loop over a sequence."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.last = getattr(nn, kind)(3, SIZE), nn.Linear(SIZE, 2)

    def forward(self, x):
        state = x.new_zeros(len(x), SIZE)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.last(state[0] if isinstance(state, tuple) else state)


class Written(nn.Module):
    """An LSTM, written out with a layer for all gates of the input, and one of the state."""

    def __init__(self):
        super().__init__()
        self.x, self.h, self.last = nn.Linear(3, 4 * SIZE), nn.Linear(SIZE, 4 * SIZE, bias=False), nn.Linear(SIZE, 2)

    def forward(self, x):
        h = c = x.new_zeros(len(x), SIZE)
        for step in range(x.shape[1]):
            i, f, g, o = (self.x(x[:, step]) + self.h(h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.last(h)


class Beside(nn.Module):
    """A gated unit that reads the input and the state side by side, and a convolutional LSTM's gates."""

    def __init__(self):
        super().__init__()
        self.gate, self.new, self.last = nn.Linear(3 + SIZE, SIZE), nn.Linear(3 + SIZE, SIZE), nn.Linear(SIZE, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), SIZE)
        for step in range(x.shape[1]):
            both = torch.cat([x[:, step], h], -1)
            z = torch.sigmoid(self.gate(both))
            h = (1 - z) * h + z * torch.tanh(self.new(both))
        return self.last(h)


class ConvLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates, self.last = nn.Conv2d(1 + SIZE, 4 * SIZE, 3, padding=1), nn.Linear(SIZE, 2)

    def forward(self, x):
        x = x[:, :, None, :, None].expand(-1, -1, -1, -1, 3)
        h = c = x.new_zeros(len(x), SIZE, *x.shape[-2:])
        for step in range(x.shape[1]):
            i, f, g, o = self.gates(torch.cat([x[:, step], h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.last(h.mean((2, 3)))


class Translation(nn.Module):
    """A decoder that starts from the state of an encoder."""

    def __init__(self, kind):
        super().__init__()
        self.encoder, self.decoder = (getattr(nn, kind)(3, SIZE, batch_first=True) for _ in range(2))
        self.last = nn.Linear(SIZE, 2)

    def forward(self, x):
        return self.last(self.decoder(x.flip(1), self.encoder(x)[1])[0])


class Learned(nn.Module):
    """A first state that is a parameter."""

    def __init__(self):
        super().__init__()
        self.layer, self.last, self.first = nn.GRU(3, SIZE), nn.Linear(SIZE, 2), nn.Parameter(torch.randn(1, 1, SIZE))

    def forward(self, x):
        return self.last(self.layer(x, self.first.expand(-1, x.shape[1], -1).contiguous())[0])


class Equilibrium(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2)

    def forward(self, x):
        added = self.first(x)
        z = torch.tanh(added)
        for _ in range(4):
            z = torch.tanh(self.inner(z) + added)
        return self.last(z)


MODULES = {
    "RNN": (lambda: Recurrent("RNN"), [SIZE]),
    "RNN relu": (lambda: Recurrent("RNN", nonlinearity="relu"), [SIZE]),
    "RNN bidirectional": (lambda: Recurrent("RNN", bidirectional=True), [SIZE] * 2),
    "LSTM": (lambda: Recurrent("LSTM"), [SIZE]),
    "LSTM of two layers": (lambda: Recurrent("LSTM", num_layers=2), [SIZE] * 2),
    "LSTM without biases": (lambda: Recurrent("LSTM", bias=False), [SIZE]),
    "GRU": (lambda: Recurrent("GRU"), [SIZE]),
    "GRU bidirectional, of two layers": (lambda: Recurrent("GRU", bidirectional=True, num_layers=2), [SIZE] * 4),
    "RNNCell": (lambda: Loop("RNNCell"), [SIZE]),
    "LSTMCell": (lambda: Loop("LSTMCell"), [SIZE]),
    "GRUCell": (lambda: Loop("GRUCell"), [SIZE]),
    "LSTM written out": (Written, [SIZE]),
    "input and state side by side": (Beside, [SIZE]),
    "convolutional LSTM": (ConvLSTM, [SIZE]),
    "encoder and decoder": (lambda: Translation("GRU"), [SIZE]),
    "encoder and decoder LSTM": (lambda: Translation("LSTM"), [SIZE]),
    "a learned first state": (Learned, [SIZE]),
    "deep equilibrium": (Equilibrium, [SIZE]),
}
"""Name -> a module, and the hidden units that are permuted, class by class, counted by hand."""


def read(name):
    torch.manual_seed(0)
    module, x = MODULES[name][0]().double().eval(), torch.randn(4, 5, 3, dtype=torch.float64)
    return module, x, from_module(module, x)


@pytest.mark.parametrize("name", MODULES)
def test_hidden_units_move_as_a_whole(name, generator):
    module, x, params = read(name)
    assert_read(module, x, generator)
    assert [item.num_channels for item in params.spec.permutation_classes] == MODULES[name][1]


@pytest.mark.parametrize(
    ("name", "weight"), [("LSTM", "weight_hh_l0"), ("RNN", "weight_ih_l0"), ("GRUCell", "weight_hh")]
)
def test_one_of_the_weights_alone_does_not_move(name, weight):
    module, x, _ = read(name)
    before = outputs(module, x)
    parameter = getattr(module.cell if "Cell" in name else module.layer, weight)
    with torch.no_grad():
        parameter[:SIZE] = parameter[:SIZE].roll(1, 0)
    assert (outputs(module, x) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "symmetry"), [("RNN", "sign"), ("RNN relu", "scale"), ("RNNCell", "sign"), ("LSTM", "permutation")]
)
def test_scalars_of_hidden_units(name, symmetry):
    spec = read(name)[2].spec
    assert {spec.class_symmetry(item).symmetry for item in spec.scaling_classes} == {symmetry}


@pytest.mark.parametrize("config", [ScaleGMNConfig(symmetry="hetero"), NGGNNConfig()])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell"])
def test_models_read_recurrent_networks(name, config, generator):
    module, x, params = read(name)
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    others = NetParams.cat([params, from_module(module, x)])
    model = config.build(params.spec).double().eval()
    model.fit_normalization([others])
    assert_invariant(model, others, generator, scale=config.name != "ng_gnn")
