"""Learning on the weights of neural networks.

params = scalegmn.NetParams.from_tensors(weights, biases, "sine", w0=30.0)
model = scalegmn.build_model("configs/mnist_cls/scalegmn_bidir.yml", spec=params.spec).eval()
output = model(params)  # [B, out_dim]

trained = scalegmn.load("RUN")  # or a bundle
answer = trained(scalegmn.from_onnx("net.onnx"))
"""

from scalegmn.config import build_model
from scalegmn.data.onnx import from_onnx
from scalegmn.data.state_dicts import from_state_dict
from scalegmn.modules import from_module, to_module
from scalegmn.spec import LayerSpec, NetParams, NetSpec
from scalegmn.trained import TrainedModel, load

__all__ = [
    "LayerSpec",
    "NetParams",
    "NetSpec",
    "TrainedModel",
    "build_model",
    "from_module",
    "from_onnx",
    "from_state_dict",
    "load",
    "to_module",
]
