"""Small CNNs (Unterthiner et al. 2020): strided convolutions, global average pooling, linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import conv2d, pad

from scalegmn.networks.evaluate import activate_layer, linear_layers, with_residual
from scalegmn.networks.params import NetParams
from scalegmn.networks.spec import NetSpec


def evaluate_cnn(
    params: NetParams, images: Tensor, stride: int | Sequence[int] = 2, padding: Literal["same", "valid"] = "same"
) -> Tensor:
    """The outputs of B CNNs: x_l = sigma_l(W_l * x_{l-1} + b_l [+ x_s]), mean over positions, then linear layers.

    All networks are evaluated at once, each as one group of a convolution's channels.

    Args:
        params: B networks of convolutions, then linear layers, if any.
        images: [P, n_0, height, width], for all networks, or [B, P, n_0, height, width].
        stride: of every convolution, or one for each.
        padding: `same`: zeros around such that ceil(size / stride) positions remain, the odd one at the bottom and
            right, as in Keras; any kernel fits any image. `valid`: none, as in the published zoo.

    Returns:
        [B, P, n_L]; the pooled channels where the last layer is a convolution.

    Raises:
        ValueError: the layers are no chain, the first is linear, a convolution follows a linear layer, or a residual
            connection comes from the input or joins images of different sizes.
    """
    return _cnn_layers(params, images, stride, padding)[1][-1]


def cnn_activations(
    params: NetParams, images: Tensor, stride: int | Sequence[int] = 2, padding: Literal["same", "valid"] = "same"
) -> list[Tensor]:
    """The output of each layer of B CNNs, its mean over positions; as `evaluate_cnn` otherwise.

    Returns:
        Per layer l = 1..L, [B, P, n_l].
    """
    return _cnn_layers(params, images, stride, padding)[1]


def cnn_pre_activations(
    params: NetParams,
    images: Tensor,
    stride: int | Sequence[int] = 2,
    padding: Literal["same", "valid"] = "same",
    shifts: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """What each layer of B CNNs computes before its activation, its mean over positions, with shifts, if any, added at
    all positions, per layer [B, P, n_l]; as `evaluate_cnn` otherwise.

    Returns:
        Per layer l = 1..L, [B, P, n_l].
    """
    return _cnn_layers(params, images, stride, padding, shifts)[0]


def _cnn_layers(
    params: NetParams,
    images: Tensor,
    stride: int | Sequence[int],
    padding: Literal["same", "valid"],
    shifts: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """`cnn_pre_activations` and `cnn_activations`."""
    spec, num_networks = params.spec, len(params)
    num_convolutions = _num_convolutions(spec)
    means: list[Tensor] = []
    pooled: list[Tensor] = []
    sources = {residual.source for residual in spec.residuals}
    outputs: dict[int, Tensor] = {}  # of the sources
    has_own_images = images.ndim == 5
    strides = [stride] * num_convolutions if isinstance(stride, int) else stride
    x = images.transpose(0, 1).flatten(1, 2) if has_own_images else images  # then [P, B n_l, height, width]
    num_images = len(x)
    for index in range(num_convolutions):
        layer, weight, bias = spec.layers[index], params.weights[index], params.biases[index]
        if padding == "same":
            top, bottom = same_padding(x.shape[2], weight.shape[3], strides[index])
            left, right = same_padding(x.shape[3], weight.shape[4], strides[index])
            x = pad(x, (left, right, top, bottom))
        # where all networks read the same images, each reads its own channels after that
        groups = num_networks if index or has_own_images else 1
        z = conv2d(x, weight.flatten(0, 1), bias.flatten(), strides[index], groups=groups)
        by_network = z.reshape(num_images, num_networks, layer.out_dim, *z.shape[2:]).transpose(0, 1)
        if shifts is not None:
            by_network = by_network + shifts[index][..., None, None]
        if layer.residual is not None:
            by_network = with_residual(by_network, outputs[layer.residual])
        means.append(by_network.mean((3, 4)))
        by_network = activate_layer(by_network, layer, params)  # [B, P, n_l, height, width]
        if index in sources:
            outputs[index] = by_network
        pooled.append(by_network.mean((3, 4)))  # [B, P, n_l]
        x = by_network.transpose(0, 1).flatten(1, 2)
    linear = linear_layers(params, pooled[-1], num_convolutions, shifts)
    return [*means, *(z for z, _ in linear)], [*pooled, *(x for _, x in linear)]


def _num_convolutions(spec: NetSpec) -> int:
    """How many convolutions come before linear layers; raises ValueError as `evaluate_cnn` does."""
    if not spec.is_chain or any(residual.source < 0 for residual in spec.residuals):
        raise ValueError(f"expected a chain of layers, without residual connections from the input, found {spec}")
    count = sum(layer.kernel is not None for layer in spec.layers)
    if not count or any(layer.kernel is None for layer in spec.layers[:count]):
        kinds = ", ".join("linear" if layer.kernel is None else "convolution" for layer in spec.layers)
        raise ValueError(f"expected convolutions, then linear layers, found {kinds}")
    return count


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, such that ceil(size / stride) positions remain."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
