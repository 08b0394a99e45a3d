"""Networks as PyTorch modules: from a module to `NetParams`, and back.

`torch.export` gives the graph of a module's operations. `reader` follows it with *numbers of neurons* in place of
activations (`values`): each value is an integer tensor of the activation's shape, which tells the neuron that each
element belongs to. Operations that only move elements (views, splits, concatenations) act on these numbers, and on the
positions of a parameter's elements; operations that compute become layers (`operators`, a rule for each operation).
`assemble` turns the layers into a `NetSpec`; `parameters` reads and writes them.
"""

from scalegmn.interop.torch_modules.convert import PinnedNeurons, from_module, read, to_module
from scalegmn.interop.torch_modules.factory import FACTORY, ExampleInput, from_factory, module_of_factory
from scalegmn.interop.torch_modules.reading import LayerReading, Reading

__all__ = [
    "FACTORY",
    "ExampleInput",
    "LayerReading",
    "PinnedNeurons",
    "Reading",
    "from_factory",
    "from_module",
    "module_of_factory",
    "read",
    "to_module",
]
