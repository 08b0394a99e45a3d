"""One layer of an input network."""

from __future__ import annotations

from dataclasses import dataclass

NORMS = ("batch", "layer", "group")
"""Normalisation layers: what the statistics are over. Root mean square norms are `layer` norms too."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer, x -> sigma(W x + b), or sigma(w0 (W x + b)) for a sine.

    A residual connection adds the output x_s of an earlier layer before the activation, to the first min(n_s, n_l)
    channels: W x + b + x_s.

    Args:
        in_dim: neurons (or channels) that it reads; of a `constant` layer, its constant inputs.
        out_dim: neurons (or channels) that it has, n_l.
        kernel: (kh, kw) of a convolution, or of a linear layer that reads all positions of an image; None for a
            linear layer.
        activation: a name in `ACTIVATIONS` (of the last layer, `"identity"`), or `"hetero"` where networks differ.
        w0: the frequency of the sines; 1 where there are none.
        residual: s, the earlier layer, counted from 0, that a residual connection comes from, -1 for the network's
            input; None: there is none.
        residual_after: the residual connection is added after the activation.
        reads: the earlier layer whose neurons it reads, -1 for the network's input; None: the one before.
        constant: it reads `in_dim` constant inputs that no other layer reads, such as the positions of a learned
            position embedding.
        groups: the layer's neurons and the neurons that it reads are cut into so many groups, and each group reads the
            group in the same place; `out_dim` for a depthwise convolution.
        norm: one of `NORMS`: a normalisation layer, whose weight is the scale and whose bias is the shift.
        norm_groups: of a group norm.
        epsilon: what a normalisation layer adds to the variance.
        affine: false: the weights are no parameters but ones; of constant inputs, zeros.
        bias: false: the biases are no parameters but zeros.
        attention: (query layer, key layer, heads of queries): the layer computes the values v of a multi-head
            attention, softmax(q k^T) v, and layers that read it read the heads' results. Where R heads of queries have
            one of keys and values (n_query = R n_key), it has no weights, and repeats each channel of the values that
            it reads for each of them, [head of keys, channel, head of queries].
        rotary: of attention whose queries and keys are turned by position, per channel of a head: the number of the
            pair that it is turned in; -1 for channels that are not turned. Empty: none are.
        score_biases: earlier layers with a neuron per head of queries, which is added to the scores of this head.
        tied: the earlier layer whose weights, transposed, this layer shares.
        maximum: layers that read it read the maximum of its values at several positions (max pooling), with which
            negative factors do not commute.
        pinned: its neurons stay where they are, with scalars of 1, as inputs and outputs do: something that no layer
            describes reads them.
        opaque: its constant inputs are computed, from the network's input and from pinned neurons, by operations that
            no layer describes.
        coupled: it has no weights, and is computed channel by channel, alike for all, from the layer that it reads and
            from these earlier ones, by operations that no activation describes; None: it is not.
        linear: of a `coupled` layer: it is linear in the layer that it reads (the values of a gate), whose scalars are
            its own.
        unscaled: no scalar but 1 commutes with what reads it.
        same_neurons: earlier layers whose neurons are this layer's at another place or time, since they have weights or
            biases of this one (a layer that is used twice), or are the state of a loop one step before.
        blocks: its channels are cut into so many blocks, which stay; channels are permuted within each.
        gates: earlier layers with a neuron for each block of its channels (the hidden neurons of an expert); layers
            that read it read each block multiplied by what is computed from these neurons, alike for all. Blocks are
            permuted together with them.
    """

    in_dim: int
    out_dim: int
    kernel: tuple[int, int] | None = None
    activation: str = "identity"
    w0: float = 1.0
    residual: int | None = None
    residual_after: bool = False
    reads: int | None = None
    constant: bool = False
    groups: int = 1
    norm: str | None = None
    norm_groups: int = 1
    epsilon: float = 0.0
    affine: bool = True
    bias: bool = True
    attention: tuple[int, int, int] | None = None
    rotary: tuple[int, ...] = ()
    score_biases: tuple[int, ...] = ()
    tied: int | None = None
    maximum: bool = False
    pinned: bool = False
    opaque: bool = False
    blocks: int = 1
    coupled: tuple[int, ...] | None = None
    linear: bool = False
    unscaled: bool = False
    same_neurons: tuple[int, ...] = ()
    gates: tuple[int, ...] = ()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in / groups) or (out, in / groups, kh, kw)."""
        return (self.out_dim, self.in_dim // self.groups, *(self.kernel or ()))

    @property
    def is_plain(self) -> bool:
        """Whether it is a linear layer or a convolution that reads all of the layer before, in a chain."""
        return (
            self.reads is None
            and self.norm is None
            and self.attention is None
            and self.tied is None
            and not self.maximum
            and not self.constant
            and not self.pinned
            and self.blocks == 1
            and self.coupled is None
            and not self.unscaled
            and not self.same_neurons
            and not self.gates
            and not self.residual_after
            and self.groups == 1
        )

    @property
    def is_zero(self) -> bool:
        """Whether its neurons are zeros: the state of a loop before the first step."""
        return self.constant and not self.opaque and not self.affine

    @property
    def is_diagonal(self) -> bool:
        """Whether each neuron reads a single channel, that in its place: normalisation, depthwise convolutions."""
        return self.groups == self.in_dim == self.out_dim > 1 or self.norm is not None
