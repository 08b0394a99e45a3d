"""Modules drawn at random from a grammar of operations that layers describe, and of others."""

import random

import torch
from torch import nn
from torch.nn import functional

BATCH, SIZE = 4, 6

ACTIVATIONS = {
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "tanh": torch.tanh,
    "sine": lambda h: torch.sin(3 * h),
    "gelu": functional.gelu,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
}


class DrawnModule(nn.Module):
    """Vectors [B, n] or images [B, n, 6, 6] -> [B, 2]; `steps` tells what it consists of.

    Args:
        seed: of the draw.
    """

    def __init__(self, seed):
        super().__init__()
        self.draw = random.Random(seed)
        self.is_image = self.draw.random() < 0.4
        self.in_dim = self.draw.randint(1, 4)
        self.layers, self.parameters_added, self.steps = nn.ModuleList(), nn.ParameterList(), []
        self.functions = []
        dim = self.add_layer(self.in_dim)
        for _ in range(self.draw.randint(1, 6)):
            dim = getattr(self, "draw_" + self.draw.choice(KINDS))(dim)
        self.head = nn.Linear(dim, 2)

    def forward(self, x):
        h = x
        for function in self.functions:
            h = function(self, h, x)
        if self.is_image:
            h = h.mean((2, 3))
        return self.head(h)

    def step(self, text, function):
        self.steps.append(text)
        self.functions.append(function)

    def new_layer(self, in_dim, out_dim):
        """A linear layer, or a convolution that keeps the size of images."""
        bias = self.draw.random() < 0.8
        if self.is_image:
            kernel = self.draw.choice((1, 3))
            layer = nn.Conv2d(in_dim, out_dim, kernel, padding=kernel // 2, bias=bias)
        else:
            layer = nn.Linear(in_dim, out_dim, bias=bias)
        return self.add(layer)

    def add(self, layer):
        """Registers a layer; returns a function that finds it in a module or a copy of it."""
        self.layers.append(layer)
        place = len(self.layers) - 1
        return lambda m: m.layers[place]

    def new_parameter(self, dim):
        parameter = nn.Parameter(torch.randn((dim, 1, 1) if self.is_image else (dim,)))
        self.parameters_added.append(parameter)
        place = len(self.parameters_added) - 1
        return lambda m: m.parameters_added[place]

    def new_activation(self):
        name = self.draw.choice(list(ACTIVATIONS))
        return name, ACTIVATIONS[name]

    # Steps: from the number of channels to that after them

    def add_layer(self, dim):
        out_dim = self.draw.randint(1, 6)
        layer = self.new_layer(dim, out_dim)
        self.step(f"layer {out_dim}", lambda m, h, x: layer(m)(h))
        return out_dim

    draw_layer = add_layer

    def draw_activation(self, dim):
        name, function = self.new_activation()
        self.step(name, lambda m, h, x: function(h))
        return dim

    def draw_norm(self, dim):
        kinds = ("batch", "group") if self.is_image else ("batch", "layer", "rms")
        kind, affine = self.draw.choice(kinds), self.draw.random() < 0.7
        if kind == "batch":
            norm = (nn.BatchNorm2d if self.is_image else nn.BatchNorm1d)(dim, affine=affine)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        elif kind == "group":
            norm = nn.GroupNorm(2 if dim % 2 == 0 else 1, dim, affine=affine)
        else:
            norm = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(dim, elementwise_affine=affine)
        place = self.add(norm)
        self.step(f"{kind} norm", lambda m, h, x: place(m)(h))
        return dim

    def draw_residual(self, dim):
        first, factor = self.new_layer(dim, dim), self.draw.choice((1, 1, -1, 0.5))
        name, function = self.new_activation()
        form = self.draw.choice(("h + f(h)", "h + f(s(h))", "s(h) + f(h)", "h - f(h)"))
        forms = {
            "h + f(h)": lambda m, h, x: h + factor * first(m)(h),
            "h + f(s(h))": lambda m, h, x: h + factor * first(m)(function(h)),
            "s(h) + f(h)": lambda m, h, x: function(h) + factor * first(m)(h),
            "h - f(h)": lambda m, h, x: h - first(m)(h),
        }
        self.step(f"{form} with {name} and {factor}", forms[form])
        return dim

    def draw_concatenation(self, dim):
        layer, (name, function) = self.new_layer(dim, dim), self.new_activation()
        if self.draw.random() < 0.5:
            self.step("cat with the input", lambda m, h, x: torch.cat([h, x], 1))
            return dim + self.in_dim
        self.step(f"cat with {name} of a layer", lambda m, h, x: torch.cat([h, function(layer(m)(h))], 1))
        return 2 * dim

    def draw_scaling(self, dim):
        factor, scale = self.draw.choice((2, 0.5, -1, 3)), self.new_parameter(dim)
        form = self.draw.choice(("a number", "a quotient", "a parameter"))
        forms = {
            "a number": lambda m, h, x: factor * h,
            "a quotient": lambda m, h, x: h / factor,
            "a parameter": lambda m, h, x: h * scale(m),
        }
        self.step(f"times {form}", forms[form])
        return dim

    def draw_offset(self, dim):
        offset = self.new_parameter(dim)
        is_number = self.draw.random() < 0.2
        self.step(
            f"plus {'0.1' if is_number else 'a parameter'}", lambda m, h, x: h + (0.1 if is_number else offset(m))
        )
        return dim

    def draw_reshape(self, dim):
        form = self.draw.choice(("there and back", "halves swapped", "contiguous"))
        forms = {
            "there and back": lambda m, h, x: h.reshape(len(h), -1).reshape(h.shape),
            "halves swapped": lambda m, h, x: torch.cat([h[:, dim // 2 :], h[:, : dim // 2]], 1),
            "contiguous": lambda m, h, x: h.transpose(0, 1).contiguous().transpose(0, 1),
        }
        self.step(form, forms[form])
        return dim

    def draw_product(self, dim):
        layer, (name, function) = self.new_layer(dim, dim), self.new_activation()
        form = self.draw.choice(("a gate", "a gate of its own", "a product with a learned number", "a maximum"))
        number = self.new_parameter(1)
        forms = {
            "a gate": lambda m, h, x: h * function(layer(m)(h)),
            "a gate of its own": lambda m, h, x: function(h) * h,
            "a product with a learned number": lambda m, h, x: h * number(m),
            "a maximum": lambda m, h, x: torch.maximum(h, layer(m)(h)),
        }
        self.step(f"{form} with {name}", forms[form])
        return dim

    def draw_slice(self, dim):
        size = self.draw.randint(1, dim)
        self.step(f"the first {size} channels", lambda m, h, x: h[:, :size])
        return size

    def draw_unknown(self, dim):
        layer = self.new_layer(dim, dim)
        form = self.draw.choice(("sorted", "cumulated", "a norm", "used twice", "reversed", "a softmax", "einsum"))
        weight = self.new_parameter(dim)
        forms = {
            "sorted": lambda m, h, x: h.sort(1).values,
            "cumulated": lambda m, h, x: h.cumsum(1),
            "a norm": lambda m, h, x: h / (h.square().mean(1, keepdim=True) + 0.1).sqrt(),
            "used twice": lambda m, h, x: layer(m)(torch.tanh(layer(m)(h))),
            "reversed": lambda m, h, x: h * h.flip(1),
            "a softmax": lambda m, h, x: h.softmax(1),
            "einsum": lambda m, h, x: torch.einsum("bc...,c->bc...", h, weight(m).flatten()),
        }
        self.step(form, forms[form])
        return dim

    def draw_dead(self, dim):
        layer = self.new_layer(dim, dim)
        self.step("an unused layer", lambda m, h, x: (layer(m)(h), h)[1])
        return dim


KINDS = (
    "layer",
    "layer",
    "activation",
    "activation",
    "norm",
    "residual",
    "concatenation",
    "scaling",
    "offset",
    "reshape",
    "product",
    "slice",
    "unknown",
    "dead",
)


def drawn_module(seed):
    """A module in float64 as it evaluates, and an input."""
    torch.manual_seed(seed)
    module = DrawnModule(seed).double().eval()
    shape = (BATCH, module.in_dim, SIZE, SIZE) if module.is_image else (BATCH, module.in_dim)
    return module, torch.randn(shape, dtype=torch.float64)
