"""Networks as `--modules factories:NAME` names them: each call makes another one."""

import torch
from architectures import BasicBlock, ResNet18
from torch import nn


def drawn(module):
    """With norms and biases that are not the ones and zeros they start with."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


def resnet18():
    return drawn(ResNet18(dim=4, num_classes=3))


def resnet():
    """Two blocks of one."""
    blocks = BasicBlock(3, 4, 1), BasicBlock(4, 5, 2)
    return drawn(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)))


def block():
    """Of a transformer."""
    return drawn(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True, activation="gelu"))


def mixed():
    """Of one of two architectures."""
    width = int(torch.randint(4, 6, ()))
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


def digits():
    """No chain: with a batch norm."""
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)
    return drawn(nn.Sequential(*layers))


def linear():
    """Of one layer."""
    return nn.Linear(3, 2)


def two_linears():
    """Without an activation between."""
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))


def bag():
    """Of words."""
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))


def number():
    return 7


same = nn.Linear(2, 3)
