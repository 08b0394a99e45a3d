"""The batched trainer of CNNs beside autograd and torch's optimizers, one network at a time, in float64."""

import itertools

import pytest
import torch
from torch import nn

import scalegmn.zoos.fit.cnns as fit_cnns
import scalegmn.zoos.fit.equal_cnns as equal_cnns
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.zoos.fit.cnn_descent import OPTIMIZERS, Choices, LabelledImages
from scalegmn.zoos.fit.cnns import train_cnns
from scalegmn.zoos.fit.equal_cnns import EqualFit
from scalegmn.zoos.fit.mixed_cnns import MixedFit

NUM = 6
P = 7


def cnn(activation, channels=(2, 4, 3, 5), classes=3):
    hidden = [LayerSpec(a, b, (3, 3), activation) for a, b in itertools.pairwise(channels)]
    return NetSpec((*hidden, LayerSpec(channels[-1], classes)))


RESIDUAL = [
    LayerSpec(2, 4, (3, 3), "gelu"),
    LayerSpec(4, 3, (7, 7), "sigmoid"),
    LayerSpec(3, 5, (5, 5), "tanh", residual=0),
    LayerSpec(5, 3, (3, 3), "leaky_relu", residual=1),
    LayerSpec(3, 3),
]
SHORT = [LayerSpec(2, 4, (3, 3), "gelu"), LayerSpec(4, 3, (7, 7), "identity"), LayerSpec(3, 3)]
WIDER = [*SHORT[:1], LayerSpec(4, 3, (7, 7), "relu"), LayerSpec(3, 2, (3, 5), "silu", residual=0), LayerSpec(2, 3)]
HETERO = [NetSpec(tuple(layers)) for layers in (RESIDUAL, SHORT, WIDER, RESIDUAL, SHORT, [SHORT[0], LayerSpec(4, 3)])]
"""Three layers in common; two networks of one architecture."""


@pytest.fixture
def problem(generator, random_params):
    """problem(activation, padding, dropout, size): a fit of six networks, two for each optimizer; of mixed architecture
    where the activation is None."""

    def make(activation, padding, dropout=0.0, size=(9, 8)):
        if activation is None:
            nets = [random_params(spec, 1).map(lambda tensor: tensor / 3) for spec in HETERO]
        else:
            nets = [random_params(cnn(activation), NUM).map(lambda tensor: tensor / 3)]
        pixels = torch.randn(40, 2, *size, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (40,), generator=generator)

        def between(low, high):
            return low + (high - low) * torch.rand(NUM, generator=generator, dtype=torch.float64)

        lr, l2 = between(0.01, 0.05), between(0.0, 0.1)
        choices = Choices(lr, l2, torch.full((NUM,), dropout), torch.arange(NUM) // 2, lr, lr)
        arguments = nets, choices, pixels, labels, P, torch.Generator().manual_seed(1)
        return nets, MixedFit(*arguments) if activation is None else EqualFit(*arguments, padding=padding)

    return make


SIZES = [("same", (9, 8)), ("same", (3, 16)), ("valid", (15, 16))]


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "sine", "identity"])
@pytest.mark.parametrize(("padding", "size"), SIZES)
def test_gradients_equal_autograd(activation, padding, size, problem, generator):
    (params,), fit = problem(activation, padding, size=size)
    index = torch.randint(40, (NUM, P), generator=generator)
    logits = fit.forward(index, training=True)
    fit.backward(logits, index)
    for b in range(NUM):
        own = params[b : b + 1].map(lambda tensor: tensor.clone().requires_grad_())
        expected = evaluate_cnn(own, fit.pixels[index[b]], padding=padding)[0]
        torch.testing.assert_close(logits[b].mT, expected.detach(), rtol=1e-10, atol=1e-12)
        nn.functional.cross_entropy(expected, fit.labels[index[b]]).backward()
        for grad, weight, bias in zip(fit.grads, own.weights, own.biases, strict=True):
            torch.testing.assert_close(grad[b, :, :-1], weight.grad[0].flatten(1), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(grad[b, :, -1], bias.grad[0], rtol=1e-9, atol=1e-12)


def test_gradients_of_mixed_architectures_equal_autograd(problem, generator):
    nets, fit = problem(None, "same")
    index = torch.randint(40, (NUM, P), generator=generator)
    logits = fit.forward(index, training=True)
    fit.differentiate(index)
    for b, (net, found) in enumerate(zip(nets, fit.grad.split(fit.sizes), strict=True)):
        own = net.map(lambda tensor: tensor.clone().requires_grad_())
        expected = evaluate_cnn(own, fit.pixels[index[b]], stride=1)[0]
        torch.testing.assert_close(logits[b].mT, expected, rtol=1e-10, atol=1e-12)
        nn.functional.cross_entropy(expected, fit.labels[index[b]]).backward()
        layers = zip(own.weights, own.biases, strict=True)
        grads = [torch.cat([w.grad[0].flatten(1), bias.grad[0][:, None]], 1).flatten() for w, bias in layers]
        torch.testing.assert_close(found, torch.cat(grads), rtol=1e-9, atol=1e-12)


def as_module(params, b):
    """One network as torch layers, 15x16 pixels without padding."""
    layers = []
    for layer, weight, bias in zip(params.spec.layers, params.weights, params.biases, strict=True):
        if layer.kernel is None:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(layer.in_dim, layer.out_dim)]
        else:
            layers.append(nn.Conv2d(layer.in_dim, layer.out_dim, 3, stride=2))
        layers[-1].weight, layers[-1].bias = nn.Parameter(weight[b].clone()), nn.Parameter(bias[b].clone())
        if layer.kernel is not None:
            layers.append({"relu": nn.ReLU(), "tanh": nn.Tanh()}[layer.activation])
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_training_equals_torch_one_by_one(activation, problem):
    """Twenty steps of each optimizer, each network with its own learning rate, weight decay and images."""
    (params,), fit = problem(activation, "valid", size=(15, 16))
    batches = [torch.randint(40, (NUM, P), generator=fit.generator) for _ in range(20)]
    for index in batches:
        fit.differentiate(index)
        fit.update()
    for b in range(NUM):
        module, lr, l2 = as_module(params, b), fit.choices.lr[b].item(), fit.choices.l2[b].item()
        groups = [
            {"params": [p for name, p in module.named_parameters() if "weight" in name], "weight_decay": 2 * l2},
            {"params": [p for name, p in module.named_parameters() if "bias" in name]},
        ]
        name = OPTIMIZERS[fit.choices.optimizer[b]]
        if name == "sgd":
            optimizer = torch.optim.SGD(groups, lr)
        elif name == "adam":
            optimizer = torch.optim.Adam(groups, lr, eps=1e-7)
        else:
            optimizer = torch.optim.RMSprop(groups, lr, alpha=0.9, eps=1e-7)
        for index in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(fit.pixels[index[b]]), fit.labels[index[b]]).backward()
            optimizer.step()
        layers = [layer for layer in module if hasattr(layer, "weight")]
        expected = torch.cat([torch.cat([la.weight.flatten(1), la.bias[:, None]], 1).flatten() for la in layers])
        torch.testing.assert_close(fit.flat.view(NUM, -1)[b], expected.detach(), rtol=1e-6, atol=1e-8)


def test_dropout(problem, generator):
    """Numbers are zero with the network's own probability, others grow; gradients follow; none while evaluating."""
    _, fit = problem("tanh", "same", dropout=0.4)
    fit.choices.dropout[0] = 0.0
    index = torch.randint(40, (NUM, P), generator=generator)
    still = fit.forward(index, training=False)
    assert torch.equal(still, fit.forward(index, training=False))
    logits = fit.forward(index, training=True)
    assert torch.equal(logits[0], still[0])
    assert not torch.equal(logits[1], still[1])
    masks = torch.cat([layer.mask.flatten(1) for layer in fit.convolutions], 1)
    assert masks[0].unique().tolist() == [1.0]
    torch.testing.assert_close(masks[1:].unique(), torch.tensor([0, 1 / 0.6], dtype=torch.float64), atol=1e-6, rtol=0)
    assert abs((masks[1:] == 0).double().mean() - 0.4) < 0.03
    fit.backward(logits, index)
    step, direction = 1e-6, torch.randn(fit.flat.shape, generator=generator, dtype=torch.float64)

    def losses(sign):
        """With the same mask."""
        fit.flat.add_(direction, alpha=sign * step)
        x = fit.pixels[index].permute(0, 2, 3, 4, 1)
        for matrix, layer in zip(fit.matrices, fit.convolutions, strict=False):
            layer.inside.copy_(x)
            layer.gather()
            x = (matrix @ layer.patches).view(layer.act.shape).tanh() * layer.mask
        fit.pooled[:, :-1] = x.mean((2, 3))
        found = nn.functional.cross_entropy(fit.matrices[-1] @ fit.pooled, fit.labels[index], reduction="none").mean(1)
        fit.flat.add_(direction, alpha=-sign * step)
        return found

    slope = (losses(1) - losses(-1)) / (2 * step)
    torch.testing.assert_close((fit.grad * direction).view(NUM, -1).sum(1), slope, rtol=1e-5, atol=1e-7)


def test_dropout_of_mixed_architectures(problem, generator):
    """Each network has its own probability; the mean over many masks is what it says without, in front of a linear
    layer; nothing changes while evaluating."""
    _, fit = problem(None, "same", dropout=0.4)
    keep = torch.where(torch.arange(NUM) == 1, 1.0, 0.6)
    fit.layers = [
        [[kind._replace(keep=keep[kind.members].view(-1, 1, 1, 1)) for kind in kinds] for kinds in calls]
        for calls in fit.layers
    ]
    index = torch.randint(40, (NUM, P), generator=generator)
    with torch.no_grad():
        still = fit.forward(index, training=False)
        assert torch.equal(still, fit.forward(index, training=False))
        found = torch.stack([fit.forward(index, training=True) for _ in range(400)])
    assert torch.equal(found[0, 1], still[1])
    assert (found.std(0)[keep < 1].amax((1, 2)) > 1e-3).all()
    error = (found.mean(0) - still)[-1] / (found.std(0)[-1] / 20)  # of one convolution and a linear layer
    assert error.abs().max() < 5


@pytest.mark.parametrize("activation", ["relu", None])
def test_accuracy_of_a_last_small_batch(activation, problem):
    nets, fit = problem(activation, "same")
    rows = torch.arange(40)[None].expand(NUM, -1)
    accuracy, finite = fit.evaluate(rows)
    logits = torch.cat([evaluate_cnn(params, fit.pixels, 2 if activation else 1) for params in nets])
    expected = (logits.argmax(2) == fit.labels).double().mean(1)
    torch.testing.assert_close(accuracy.double(), expected, rtol=0, atol=1e-6)
    assert finite.all()


@pytest.fixture
def images(generator):
    pixels = torch.randn(60, 1, 8, 8, generator=generator)
    labels = (pixels[:, 0, :4].mean((1, 2)) > 0).long() + 2 * (pixels[:, 0, 4:].mean((1, 2)) > 0).long()
    return LabelledImages(pixels, labels, torch.arange(10, 60), torch.arange(10))


def choose(generator, num=24):
    def between(low, high):
        return low + (high - low) * torch.rand(num, generator=generator)

    fractions = torch.tensor([0.2, 1.0])[torch.arange(num) // 2 % 2]
    optimizer = torch.randint(3, (num,), generator=generator)
    return Choices(between(1e-3, 1e-2), between(0, 1e-3), between(0, 0.5), optimizer, between(0.1, 0.3), fractions)


def trained(choices, images, checkpoints=(0, 3), **options):
    specs = [cnn(("tanh", "relu")[k % 2], (1, 4, 5), 4) for k in range(24)]
    return train_cnns(specs, choices, images, checkpoints, 8, "same", (0, 1), **options)


def trained_mixed(choices, images, checkpoints=(0, 3), **options):
    others = [cnn("tanh", (1, 4, 5), 4), cnn("gelu", (1, 4), 4), cnn("sigmoid", (1, 8, 5, 4), 4)]
    specs = [others[k % 3] for k in range(24)]
    return train_cnns(specs, choices, images, checkpoints, 8, None, (0, 1), **options)


@pytest.mark.parametrize(("train", "stride"), [(trained, 2), (trained_mixed, 1)])
def test_networks_come_back_in_order(images, generator, train, stride):
    choices, done = choose(generator), []
    found = train(choices, images, on_done=done.append)
    assert sum(done) == 24
    names = ["tanh", "relu"] if train is trained else ["tanh", "gelu", "sigmoid"]
    assert [params.spec.layers[0].activation for params in found.nets] == [names[k % len(names)] for k in range(24)]
    for number, params in enumerate(found.nets):
        logits = evaluate_cnn(params, images.pixels[images.test], stride)
        expected = (logits.argmax(2) == images.labels[images.test]).float().mean(1)
        torch.testing.assert_close(found.test_accuracy[number], expected)
        assert not any(bias[0].any() for bias in params.biases)
    start = [torch.cat([w[0].flatten() for w in params.weights]) for params in found.nets]  # at epoch 0
    torch.testing.assert_close(torch.stack([w.std() for w in start]), choices.init_std, rtol=0.3, atol=0)
    seen = (found.train_accuracy * (50 * choices.train_fraction)[:, None]).double()
    torch.testing.assert_close(seen, seen.round(), rtol=0, atol=1e-4)  # whole images, of those that it has seen
    assert found.finite.all()


@pytest.mark.parametrize("train", [trained, trained_mixed])
def test_result_does_not_depend_on_cores(images, generator, monkeypatch, train):
    monkeypatch.setattr(equal_cnns, "CACHE_BYTES", 300_000)
    monkeypatch.setattr(fit_cnns, "MIXED_AT_ONCE", 5)
    choices, found, threads = choose(generator), [], torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(train(choices, images))
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)
    for first, second in zip(found[0].nets, found[1].nets, strict=True):
        assert torch.equal(first.flatten(), second.flatten())


@pytest.mark.parametrize("train", [trained, trained_mixed])
def test_a_diverged_network_is_named_and_harms_no_other(images, generator, train):
    choices = choose(generator)
    choices.optimizer[:] = 0
    good = train(choices, images, (20,))
    assert good.finite.all()
    choices.lr[6] = 1e30
    bad = train(choices, images, (20,))
    assert bad.finite[:, 0].tolist() == [number != 6 for number in range(24)]
    for number, (first, second) in enumerate(zip(good.nets, bad.nets, strict=True)):
        assert torch.equal(first.flatten(), second.flatten()) == (number != 6)
