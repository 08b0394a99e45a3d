"""ResNet-18 (11.7 million parameters) as a parameter graph, and through a model.

python benchmarks/resnet18.py [--symmetry scale] [--direction forward] [--hidden_dim 32]

Prints the seconds from the module to the graph (the second time: the first call imports `torch.export`), those of one
inference of ScaleGMN on it, and the peak memory of the process.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from architectures import ResNet18

from scalegmn import from_module
from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.models.scalegmn import ScaleGMNConfig


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symmetry", default="scale")
    parser.add_argument("--direction", default="forward")
    parser.add_argument("--hidden_dim", type=int, default=32)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    module, images = ResNet18().eval(), torch.randn(1, 3, 224, 224)
    for _ in range(2):
        start = time.perf_counter()
        params = from_module(module, images)
        spec = params.spec
        graph = ParameterGraph.from_params([params], spec.kernel, spec.num_hidden_layers)
        seconds = time.perf_counter() - start
    print(f"graph: {len(graph.nodes):,} nodes, {len(graph.edges):,} edges, {seconds:.2f} s")
    del graph
    model = ScaleGMNConfig(**vars(arguments), out_dim=1).build(spec).eval()
    start = time.perf_counter()
    with torch.no_grad():
        model(params)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{arguments}: {time.perf_counter() - start:.1f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
