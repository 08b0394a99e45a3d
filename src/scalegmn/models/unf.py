"""Universal neural functionals (Zhou et al., NeurIPS 2024): linear layers on the weights of any architecture."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.initialization import Init, initialized
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.universal import UniversalLayer, blocks_of, cut, folded, joined, means, means_width
from scalegmn.nn.weight_space import channel_products


@dataclass(frozen=True)
class UNFConfig(ModelConfig):
    """UNF: linear layers that permutations of neurons allow, derived from any architecture, with ReLU between."""

    name = "unf"

    hidden_dims: tuple[int, ...] = (32, 32, 32)
    """Channels after each layer; with output parameters, one more layer follows."""

    products: bool = False
    """Layers multiply what they read at a weight between neurons that permute by what they read at its ends, where the
    published ones add; tanh in place of ReLU; for vectors, the means are of products of two channels."""

    init: Init = "published"
    """Initial parameters. balanced, for products: features keep their size and start odd, as if the model knew the
    signs of neurons (`scalegmn.nn.initialization`). published: normal, by how much an entry of a layer reads."""

    readout_dim: int = 128
    """For vectors: width of the readout's two hidden layers."""

    readout_dropout: float = 0.0
    """After each of them."""

    def __post_init__(self) -> None:
        problems = self.wrong_choices() + self.wrong_numbers(["out_dim", "readout_dim"], ["readout_dropout"])
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            problems.append(f"hidden_dims: found {list(self.hidden_dims)}, expected one or more positive widths")
        elif self.products and self.hidden_dims[-1] % 2 and not self.changes_parameters:
            problems.append(f"hidden_dims: found {list(self.hidden_dims)}, expected an even last one for products")
        if self.init == "balanced":  # layers would not start odd
            problems += self.wrong_for("init balanced", products=True)
        self.refuse(problems)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations of hidden neurons."""
        return frozenset({"permutation"})

    def build(self, spec: NetSpec) -> UNF:
        """The model for networks of `spec`."""
        return initialized(UNF(self, spec), self.init, spec)


METANETWORKS.register(UNFConfig.name, UNFConfig)


class UNF(Metanetwork):
    """A function of the parameters of networks of any one architecture, that permutations of its neurons leave as it is
    (changes of parameters: that they move along).

    `UniversalLayer`, ReLU, ..., then for vectors an MLP of the means of all blocks, for parameters one more layer. The
    layers are all that the architecture's classes of neurons allow: neurons that residual connections, norms or
    attention couple share an axis, and layers that have one share maps (UNF, https://arxiv.org/abs/2402.05232). Where
    blocks of neurons are permuted as a whole (groups, heads), the layers are those for all permutations of a class,
    which are fewer. With `products`, which are not published, layers are quadratic. Weights and biases are normalised
    per layer unless `normalize` is false.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: changes are asked for of networks of which several layers share weights.
    """

    def __init__(self, config: UNFConfig, spec: NetSpec) -> None:
        if config.changes_parameters and any(layer.tied is not None or layer.same_neurons for layer in spec.layers):
            raise ValueError(f"model: unf changes each layer's weights by themselves, found shared ones in {spec}")
        normalization = None if config.normalize is False else InputNormalization(spec.num_layers, centred=True)
        super().__init__(config, spec, normalization)
        self.config, self.blocks = config, blocks_of(folded(spec))
        dims = [1, *config.hidden_dims]
        layers = [UniversalLayer(self.blocks, i, o, config.products) for i, o in pairwise(dims)]
        self.activation = torch.tanh if config.products else torch.relu
        self.readout = None
        if config.changes_parameters:
            layers.append(UniversalLayer(self.blocks, dims[-1], config.heads, config.products))
        else:
            width, hidden = dims[-1] // 2 if config.products else dims[-1], (config.readout_dim, config.readout_dim)
            p = config.readout_dropout
            self.readout = MLP(width * means_width(self.blocks), hidden, config.out_dim, dropout=p)
        self.layers = nn.ModuleList(layers)

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the networks have the same blocks."""
        super().validate_spec(spec)
        if blocks_of(folded(spec)) != self.blocks:
            raise ValueError(f"the model was built for {self.spec}, found {spec}, whose neurons are coupled otherwise")

    def forward(self, params: NetParams) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        if params.spec != self.spec:
            self.validate_spec(params.spec)
        features = cut(self.blocks, self.normalized(params))
        for index, layer in enumerate(self.layers):
            features = layer(features)
            if self.readout is not None or index < len(self.layers) - 1:
                features = list(map(self.activation, features))
        if self.readout is not None:
            if self.config.products:
                features = [channel_products(x, 1) for x in features]
            output: Tensor = self.readout(means(self.blocks, features))
            return output
        of_heads = [x.unflatten(-1, (-1, self.config.heads)).unbind(-1) for x in features]
        return self.joined_heads([joined(self.blocks, list(x), params) for x in zip(*of_heads, strict=True)])
