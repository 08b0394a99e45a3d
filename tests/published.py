"""Small datasets in the published layouts, written as their authors' scripts write them."""

import csv
import gzip
import json
import struct
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch

from scalegmn.networks import NetParams
from scalegmn.networks.siren import render

MNIST = {"training": (5, 0, 4, 1, 9, 2, 1, 3), "testing": (7, 2, 1)}
"""Labels of the images 0, 1, ... of each part."""


def siren(generator, layout=(2, 5, 4, 1), prefix="seq"):
    """A state dict; its biases leave the canonical range."""
    state = {}
    for index, (n_in, n_out) in enumerate(pairwise(layout)):
        state[f"{prefix}.{index}.weight"] = torch.randn(n_out, n_in, generator=generator)
        state[f"{prefix}.{index}.bias"] = torch.randn(n_out, generator=generator)
    return state


def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def write_mnist(root: Path, generator, elsewhere="/home/someone/data/mnist-inrs") -> dict:
    """mnist-inrs below `root`, and splits made on another machine; (part, image) -> state dict."""
    states, splits = {}, {name: {"path": [], "label": []} for name in ("train", "val", "test")}
    for part, labels in MNIST.items():
        for image, label in enumerate(labels):
            path = f"mnist_png_{part}_{label}_{image}/checkpoints/model_final.pth"
            states[part, image] = siren(generator)
            save(states[part, image], root / "mnist-inrs" / path)
            split = "test" if part == "testing" else "val" if image in (1, 4) else "train"
            splits[split]["path"].insert(0, f"{elsewhere}/{path}")
            splits[split]["label"].insert(0, str(label))
    (root / "mnist_splits.json").write_text(json.dumps(splits))
    return states


def write_mnist_images(root: Path, states: dict) -> None:
    """The IDX files below `root`, with the images that the networks of `write_mnist` draw."""
    folder = root / "mnist-inrs" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, name in (("training", "train"), ("testing", "t10k")):
        own = [state for (found, _), state in states.items() if found == part]
        weights, biases = (
            [torch.stack([state[f"seq.{layer}.{kind}"] for state in own]) for layer in range(3)]
            for kind in ("weight", "bias")
        )
        drawn = render(NetParams.from_tensors(weights, biases, "sine", 30.0), 28, 28)
        pixels = (drawn.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        size = 60_000 if part == "training" else len(own)  # the other images are black
        content = struct.pack(">iiii", 0x0803, size, 28, 28) + pixels.tobytes() + bytes((size - len(own)) * 28 * 28)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, 1))
        content = struct.pack(">ii", 0x0801, size) + bytes(MNIST[part]) + bytes(size - len(own))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(content)


def write_fmnist(root: Path, generator) -> dict:
    """fmnist_inrs/{train,val,test}/model_<n>.pth with labels inside; (split, n) -> state dict."""
    states, splits = {}, {}
    for split, numbers in {"train": (10, 2, 33, 4), "val": (7, 1), "test": (0, 12, 5)}.items():
        splits[split] = {"path": [f"fmnist_inrs/{split}/model_{n}.pth" for n in numbers]}
        for n in numbers:
            states[split, n] = {**siren(generator), "label": (3 * n) % 10}
            save(states[split, n], root / split / f"model_{n}.pth")
    (root / "splits.json").write_text(json.dumps(splits))
    return states


def write_cifar(root: Path, generator, augs=2) -> dict:
    """siren_cifar_wts with `augs` more fits of each training image; (aug or None, image) -> state dict."""
    states = {}
    for aug in (None, *range(augs)):
        for image in (0, 1, 2, 44_999, 45_000, 49_999, 50_000, 59_999):
            if aug is not None and image >= 50_000:
                continue
            states[aug, image] = siren(generator, (2, 4, 4, 3), "net.net")
            middle = "" if aug is None else f"_aug{aug}"
            save(states[aug, image], root / f"randinit_smaller{middle}_{image % 7}s" / f"net{image}.pth")
    return states


WILD_PARK = {  # run -> channels, kernels, activations, residuals of its network
    "NN_tune_trainable_0a": ([3, 4, 8], [3, 5], ["relu", "gelu"], [-1, -1]),
    "NN_tune_trainable_1b": ([3, 8, 4, 4], [7, 3, 3], ["tanh", "none", "leaky_relu"], [-1, -1, 0]),
    "NN_tune_trainable_2c": ([3, 4, 8], [3, 5], ["relu", "gelu"], [-1, -1]),  # as the first
    "NN_tune_trainable_3d": ([3, 4, 8], [3, 5], ["relu", "sigmoid"], [-1, -1]),
}


OMEGACONF = {
    name: type(name, (), {"__module__": f"omegaconf.{module}"})
    for module, name in (("dictconfig", "DictConfig"), ("listconfig", "ListConfig"), ("nodes", "AnyNode"))
}
"""Classes that pickle as OmegaConf's do, without the library."""


def omegaconf(name: str, **content):
    """An object of one of them."""
    made = OMEGACONF[name]()
    made.__dict__.update(content, _parent=None)
    return made


def wild_park_config(channels, kernels, activations, residuals):
    """The description of an architecture."""

    def node(value):
        if isinstance(value, list):
            return omegaconf("ListConfig", _content=[node(own) for own in value])
        return omegaconf("AnyNode", _val=value)

    content = {"n_layers": len(kernels), "n_classes": 10, "channels": channels, "kernel_size": kernels}
    content |= {"stride": [1] * len(kernels), "padding": [k // 2 for k in kernels]}
    content |= {"residual": residuals, "activation": activations}
    content = {key: node(value) for key, value in content.items()}
    return omegaconf("DictConfig", _content=content)


def save_as_omegaconf(content, path: Path) -> None:
    """Saves while the modules of these classes are there."""
    modules = {"omegaconf": ModuleType("omegaconf")}
    for name, kind in OMEGACONF.items():
        modules[kind.__module__] = ModuleType(kind.__module__)
        setattr(modules[kind.__module__], name, kind)
    with patch.dict(sys.modules, modules):
        save(content, path)


def write_wild_park(root: Path, generator) -> dict:
    """cifar10_zooV2/<run>/checkpoint_<step>/checkpoint.pt and the splits; (split, run, step) -> state dict, score."""
    found, splits = {}, {name: {"path": [], "score": [], "step": []} for name in ("train", "val", "test")}
    for number, (run, (channels, kernels, *rest)) in enumerate(WILD_PARK.items()):
        split = ("train", "val", "train", "test")[number]
        for step in (20, 10):
            state = {}
            for index, (a, b, k) in enumerate(zip(channels, channels[1:], kernels, strict=False)):
                state[f"layers.{index}.weight"] = torch.randn(b, a, k, k, generator=generator)
                state[f"layers.{index}.bias"] = torch.randn(b, generator=generator)
            state["fc.weight"] = torch.randn(10, channels[-1], generator=generator)
            state["fc.bias"] = torch.randn(10, generator=generator)
            path = f"cifar10_zooV2/{run}/checkpoint_{step:06d}/checkpoint.pt"
            content = {"model": state, "config": wild_park_config(channels, kernels, *rest), "iteration": step}
            save_as_omegaconf(content, root / path)
            score = round(0.1 * number + step / 400, 4)
            for key, value in {"path": path, "score": score, "step": step}.items():
                splits[split][key].append(value)
            found[split, run, step] = (state, score)
    (root / "cnn_park_splits.json").write_text(json.dumps(splits))
    return found


CNN_LAYOUT = [
    ("sequential/conv2d/bias:0", (2,)),
    ("sequential/conv2d/kernel:0", (3, 3, 1, 2)),
    ("sequential/conv2d_1/bias:0", (3,)),
    ("sequential/conv2d_1/kernel:0", (3, 3, 2, 3)),
    ("sequential/dense/bias:0", (4,)),
    ("sequential/dense/kernel:0", (3, 4)),
]


def write_cnns(root: Path, rows=300, name="cifar10", seed=0):
    """weights.npy, metrics.csv.gz, layout.csv and the split; the weights, and the metrics per row."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    start, lines = 0, []
    for varname, shape in CNN_LAYOUT:
        lines.append([varname, start, start + int(np.prod(shape)), str(shape)])
        start = lines[-1][2]
    weights = rng.standard_normal((rows, start)).astype(np.float32)
    np.save(root / "weights.npy", weights)
    with open(root / "layout.csv", "w", newline="") as file:
        csv.writer(file).writerows([["varname", "start_idx", "end_idx", "shape"], *lines])
    metrics = [
        {
            "step": (0, 20, 86)[k % 3],
            "test_accuracy": round(float(rng.random()), 6),
            "config.activation": ("relu", "tanh")[(k // 3) % 2],
        }
        for k in range(rows)
    ]
    with gzip.open(root / "metrics.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, ["", *metrics[0]])
        writer.writeheader()
        writer.writerows({"": k, **row} for k, row in enumerate(metrics))
    order = rng.permutation(rows)
    np.savetxt(root / f"{name}_split.csv", order, fmt="%d")
    return weights, metrics, order.tolist()
