"""Learning on the weights of neural networks.

params = scalegmn.NetParams.from_tensors(weights, biases, "sine", w0=30.0)
model = scalegmn.build_model("configs/mnist_cls/scalegmn_bidir.yml", spec=params.spec).eval()
output = model(params)  # [B, out_dim]

trained = scalegmn.load("RUN")  # or a bundle
answer = trained(scalegmn.from_onnx("net.onnx"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalegmn.experiments.config import build_model
    from scalegmn.experiments.trained import TrainedModel, load
    from scalegmn.experiments.trained_optimizer import load_optimizer
    from scalegmn.interop.onnx import from_onnx
    from scalegmn.interop.state_dicts import from_state_dict
    from scalegmn.interop.torch_modules import from_module, to_module
    from scalegmn.networks import LayerSpec, NetParams, NetSpec
    from scalegmn.zoos.zoo_format import Networks, Zoo, open_zoo, write_zoo

__all__ = [
    "LayerSpec",
    "NetParams",
    "NetSpec",
    "Networks",
    "TrainedModel",
    "Zoo",
    "build_model",
    "from_module",
    "from_onnx",
    "from_state_dict",
    "load",
    "load_optimizer",
    "open_zoo",
    "read",
    "to_module",
    "write_zoo",
]

_HOMES = {
    "LayerSpec": "networks",
    "NetParams": "networks",
    "NetSpec": "networks",
    "Networks": "zoos.zoo_format",
    "TrainedModel": "experiments.trained",
    "Zoo": "zoos.zoo_format",
    "build_model": "experiments.config",
    "from_module": "interop.torch_modules",
    "from_onnx": "interop.onnx",
    "from_state_dict": "interop.state_dicts",
    "load": "experiments.trained",
    "load_optimizer": "experiments.trained_optimizer",
    "open_zoo": "zoos.zoo_format",
    "read": "interop.torch_modules",
    "to_module": "interop.torch_modules",
    "write_zoo": "zoos.zoo_format",
}
"""Public name -> the module that defines it."""

_ROOMS = (
    "networks",
    "symmetry",
    "graphs",
    "nn",
    "engine",
    "models",
    "zoos",
    "optimizers",
    "tasks",
    "training",
    "interop",
    "experiments",
)


def __getattr__(name: str) -> Any:
    """A public name, a room or the version, found when it is first used (PEP 562)."""
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(import_module(f"scalegmn.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"scalegmn.{name}")
    raise AttributeError(f"module 'scalegmn' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("scalegmn")
    except PackageNotFoundError:
        return "0+unknown"  # a source tree that is not installed


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
