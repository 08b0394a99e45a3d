"""Learning on the weights of neural networks.

params = scalegmn.NetParams.from_tensors(weights, biases, "sine", w0=30.0)
model = scalegmn.build_model("configs/mnist_cls/scalegmn_bidir.yml", spec=params.spec).eval()
output = model(params)  # [B, out_dim]
"""

from scalegmn.config import build_model
from scalegmn.modules import from_module, to_module
from scalegmn.spec import LayerSpec, NetParams, NetSpec

__all__ = ["LayerSpec", "NetParams", "NetSpec", "build_model", "from_module", "to_module"]
