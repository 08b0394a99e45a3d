"""Single networks as ONNX files. A file is data: nothing in it is executed, and it may not lead to other files.

`graph` makes a file a PyTorch module, with a function for each operator (`operators`); the module is then read as any
other, by the rules of `interop.torch_modules.operators`. `activations` finds the activations that exporters spell out.
"""

from scalegmn.interop.onnx.convert import from_onnx

__all__ = ["from_onnx"]
