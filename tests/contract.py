"""What every metanetwork must satisfy, in float64, for every configuration: a suite that each model's tests inherit."""

from dataclasses import replace

import pytest
import torch

from scalegmn.experiments.symmetry_report import outputs_on
from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.measure import relative_change


def build(config, spec):
    """A model away from its initialisation, where every parameter matters: initial values + noise."""
    torch.manual_seed(1)
    model = config.build(spec).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def flat(output):
    """[B, numbers] of either kind of output."""
    tensors = [output] if isinstance(output, torch.Tensor) else [*output.weights, *output.biases]
    return torch.cat([tensor.flatten(1) for tensor in tensors], 1)


@torch.no_grad()
def error(model, params, element):
    """How far the outputs move with the networks, relative to the spread between networks; changes are moved back."""
    pairs = zip(outputs_on(model, params, (), element), outputs_on(model, params, ()), strict=True)
    return max(relative_change(moved, outputs) for moved, outputs in pairs)


def claims_scalars(config, spec):
    """Whether a model claims all scalars that the networks' neurons admit: signs, positive scales, or both."""
    admitted = {*spec.symmetries} - {"permutation"}
    return ({"sign", "scale"} if "hetero" in admitted else admitted) <= config.exact_symmetries


def without_residuals(params):
    """The same weights, as those of networks without residual connections."""
    layers = tuple(replace(layer, residual=None) for layer in params.spec.layers)
    return NetParams(NetSpec(layers), params.weights, params.biases, params.activation)


def assert_ties_are_seen(model, params, generator):
    """Permutations that tear apart what residual connections tie change the output, and so does their absence."""
    loose = without_residuals(params)
    assert error(model, params, GroupElement.sample(loose, generator, scale=False)) > 1e-6
    assert (flat(model(params)) - flat(model(loose))).abs().max() > 1e-6


def assert_engine_computes_the_plain_form(model, nets):
    """Outputs, and their gradients for the model's parameters and the networks', of both forms."""
    forms = []
    for engine in ("fast", "plain"):
        model.engine = engine
        batches = [params.map(lambda tensor: tensor.detach().requires_grad_()) for params in nets]
        output = flat(model(batches if len(batches) > 1 else batches[0]))
        leaves = [*model.parameters(), *(x for params in batches for x in (*params.weights, *params.biases))]
        weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)
        forms.append([output, *torch.autograd.grad((weights * output).sum(), leaves, materialize_grads=True)])
    for fast, plain in zip(*forms, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-10)


class Contract:
    """A subclass says what `case` is: (config, spec), one per parameter of the fixture."""

    @pytest.fixture
    def config(self, case):
        return case[0]

    @pytest.fixture
    def spec(self, case):
        return case[1]

    @pytest.fixture
    def nets(self, spec, random_params):
        """nets(B): random networks; mixed specs alternate relu and tanh."""
        activation = [BUILT_IN.index(name) for name in ("relu", "tanh")]
        return lambda num: random_params(spec, num, (activation * num)[:num] if "hetero" in spec.symmetries else None)

    @pytest.fixture
    def model(self, config, spec, nets):
        model = build(config, spec)
        model.fit_normalization([nets(50)])
        return model

    def silent(self, config, spec):
        """Whether the first weights are multiplied by features that are zero."""
        return False

    def test_keeps_the_symmetries_it_claims(self, model, config, nets, generator):
        if not config.exact_symmetries:
            pytest.skip("claims nothing")
        permute, scale = "permutation" in config.exact_symmetries, claims_scalars(config, model.spec)
        params = nets(6)
        for _ in range(3):
            element = GroupElement.sample(params, generator, permute=permute, scale=scale)
            assert error(model, params, element) <= 1e-9

    def test_keeps_no_more(self, model, config, nets, generator):
        params = nets(6)
        if "permutation" not in config.exact_symmetries:
            assert error(model, params, GroupElement.sample(params, generator, scale=False)) > 1e-6
        element = GroupElement.sample(params, generator, permute=False)
        if not claims_scalars(config, model.spec) and any((q != 1).any() for q in element.scales):
            assert error(model, params, element) > 1e-6
        unchanged = GroupElement.sample(params, generator, permute=False, scale=False)
        factor = {"scale": -1, "hetero": -3}.get(params.spec.symmetries[0], 2)  # outside every network's group
        outside = GroupElement(unchanged.permutations, tuple(factor * q for q in unchanged.scales))
        assert error(model, params, outside) > 1e-6

    def test_a_broken_model_is_caught(self, model, config, nets, generator):
        """One that tells the first hidden neuron from the others."""
        if "permutation" not in config.exact_symmetries:
            pytest.skip("claims nothing that could be broken so")

        def broken(params):
            first = params.biases[0].clone()
            first[:, 0] += 1
            return model(NetParams(params.spec, params.weights, (first, *params.biases[1:]), params.activation))

        params = nets(6)
        assert error(broken, params, GroupElement.sample(params, generator, scale=False)) > 1e-6

    def test_batched_equals_one_by_one(self, model, nets):
        params = nets(5)
        together = flat(model(params))
        alone = torch.cat([flat(model(params[index : index + 1])) for index in range(5)])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)

    def test_no_gradient_between_networks(self, model, config, spec, nets):
        params = nets(4).map(lambda tensor: tensor.requires_grad_())
        flat(model(params)).unflatten(0, (4, -1))[1].sum().backward()  # of all heads
        biases = (bias for bias, layer in zip(params.biases, spec.layers, strict=True) if layer.bias)
        for index, tensor in enumerate((*params.weights, *biases)):
            reached = tensor.grad.flatten(1).abs().amax(1) > 0
            assert not reached[[0, 2, 3]].any()
            if index < spec.num_layers and not self.silent(config, spec):
                assert reached[1]

    def test_every_parameter_is_used(self, model, nets):
        flat(model(nets(4))).square().sum().backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        assert unused == []

    def test_other_networks_are_refused(self, model, random_params):
        others = NetSpec((LayerSpec(5, 7, (2, 2), "tanh"), LayerSpec(7, 6)))
        with pytest.raises(ValueError, match="the model was built for"):
            model(random_params(others, 2))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_other_types_are_refused(self, model, nets, dtype):
        params = nets(2).to(dtype)
        for networks in (params, [params, params]):
            with pytest.raises(ValueError, match=rf"networks are {dtype} on cpu, .* pass params.to\(torch.float64\)$"):
                model(networks)


class EngineContract(Contract):
    """Also of models that have a plain and a fast form."""

    def test_engine_computes_the_plain_form(self, model, nets):
        assert_engine_computes_the_plain_form(model, [nets(3)])
