import pytest
import torch
from contract import Contract, build

from scalegmn.models.inr2jls import INR2JLSConfig
from scalegmn.networks import NetSpec
from scalegmn.networks.siren import render

SPECS = [NetSpec.mlp([2, 5, 4, 1], "sine", 6.0), NetSpec.mlp([2, 4, 3], "relu")]
CONFIG = INR2JLSConfig(hidden_dim=8, num_frequencies=4, readout_dim=16, latent_channels=3, image_size=4)


class TestINR2JLS(Contract):
    @pytest.fixture(params=[(CONFIG, spec) for spec in SPECS], ids=str)
    def case(self, request):
        return request.param

    def test_every_parameter_is_used(self, model, nets):
        """The decoder's in training alone."""
        model.eval()(nets(4)).square().sum().backward()
        unused = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
        assert unused == {"decoder"}
        assert model.auxiliary_loss is None
        model.train()(nets(4))
        model.auxiliary_loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@torch.no_grad()
def test_the_image_loss_is_that_of_what_the_networks_draw(random_params):
    params, drawn = random_params(SPECS[0], 3), []
    model = build(CONFIG, SPECS[0]).train()
    model.decoder.register_forward_hook(lambda module, args, result: drawn.append(result))
    model(params)
    error = (drawn[0] - render(params, 4, 4)[..., 0][:, None]).square().mean()
    torch.testing.assert_close(model.auxiliary_loss, 10 * error)


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"inr2jls_args.image_size: found 6, expected a multiple of 4"):
        INR2JLSConfig(image_size=6)
    with pytest.raises(ValueError, match="inr2jls reads INRs of images, of two coordinates, found"):
        CONFIG.build(NetSpec.mlp([3, 4, 1], "sine"))
