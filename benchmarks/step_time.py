"""How much of the machine a training step uses.

python benchmarks/step_time.py [--cases mnist_bidir ...] [--batch_sizes 64 ...] [--out FILE.jsonl]
    [--device cpu|cuda] [--precision fp32|bf16] [--compile] [--inference] [--profile] [--mixed]

A step is forward, backward, gradient clipping and AdamW on a batch of random networks of the published size, under the
published configuration. Reported: networks per second, peak memory of the process (of the GPU), counted work per
network, the machine's own matrix rate ([17920, 128] x [128, 128] in fp32) measured before and after each step, and

    efficiency = counted work per network x networks per second / matrix rate,

all medians over the rounds.

Counted work: two operations per multiply-add of all matrix products that are left when each is done once per node
where it can be, consecutive Linears without anything between them are joined, and only what the output depends on is
computed; backward counts as twice forward, recomputation not at all. It does not use that an edge whose feature is one
number times a vector needs no products of its own (`ScaledRows`), so doing that shows as efficiency. Of models other
than ScaleGMN it is what the matrix products and convolutions of one more network do as they are written, for this
spec and configuration: not what is done once for all networks,
such as ProbeGen's generator, nor sorting, which is most of
StatNN.

--mixed: in turns with these steps, networks pass as those of two architectures do, which happen to be equal.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scalegmn.experiments.config import build_model
from scalegmn.models.base import Metanetwork
from scalegmn.models.scalegmn import ScaleGMN
from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, MLPLayer
from scalegmn.nn.invariant import ByScalarGroup, InvariantLayer, SignInvariant
from scalegmn.nn.messages import ConcatMessage, ProductMessage
from scalegmn.nn.mlp import MLP
from scalegmn.nn.readout import DeepSetReadout, EndsReadout, GraphReadout
from scalegmn.training.flat import FlatParameters
from scalegmn.training.gradients import backward_in_micro_batches
from scalegmn.training.memory import keep_freed_memory
from scalegmn.training.precision import mark_batch_size_dynamic

CONFIGS = Path(__file__).parents[1] / "configs"


def cnn(activation: str) -> NetSpec:
    """The small CNN zoo's architecture."""
    layers = [LayerSpec(i, o, (3, 3), activation) for i, o in pairwise([1, 16, 16, 16])]
    return NetSpec((*layers, LayerSpec(16, 10)))


PRODUCTS = ["message_function=product", "update_edges=false", "aggregator=mean", "width_transfer=true"]
"""No MLP per edge: messages are products of matrices."""

CASES = {
    "mnist_products": ("mnist_cls/scalegmn.yml", NetSpec.mlp([2, 32, 32, 1], "sine"), *PRODUCTS),
    "mnist_bidir_products": ("mnist_cls/scalegmn_bidir.yml", NetSpec.mlp([2, 32, 32, 1], "sine"), *PRODUCTS),
    "mnist_forward": ("mnist_cls/scalegmn.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "mnist_bidir": ("mnist_cls/scalegmn_bidir.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "fmnist_bidir": ("fmnist_cls/scalegmn_bidir.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "cifar_bidir": ("cifar_inr_cls/scalegmn_bidir.yml", NetSpec.mlp([2, 32, 32, 3], "sine")),
    "relu_cnn_forward": ("cifar10/scalegmn_relu.yml", cnn("relu")),
    "relu_cnn_bidir": ("cifar10/scalegmn_relu_bidir.yml", cnn("relu")),
    "hetero_bidir": ("cifar10/scalegmn_hetero_bidir.yml", cnn("hetero")),
    "editing_bidir": ("mnist_editing/scalegmn_bidir.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "ng_gnn": ("mnist_cls/ng_gnn.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "ng_gnn_editing": ("mnist_editing/ng_gnn.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "ng_gnn_cnn": ("cifar10/ng_gnn.yml", cnn("relu")),
    "ng_t": ("mnist_cls/ng_t.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "ng_t_editing": ("mnist_editing/ng_t.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "ng_t_cnn": ("cifar10/ng_t.yml", cnn("relu")),
    "dwsnet": ("mnist_cls/dwsnet.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "nfn": ("mnist_cls/nfn.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "nfn_cnn": ("cifar10/nfn.yml", cnn("relu")),
    "statnn": ("cifar10/statnn.yml", cnn("relu")),
    "probegen": ("mnist_cls/probegen.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
    "probegen_cnn": ("cifar10/probegen.yml", cnn("relu")),
    "mlp": ("mnist_cls/mlp.yml", NetSpec.mlp([2, 32, 32, 1], "sine")),
}


# Counted work, in multiply-adds


def mlp_work(mlp: MLP, in_dim: int) -> int:
    """Of one row, of which `in_dim` columns are its own."""
    first, *rest = mlp.linears
    return in_dim * first.out_features + sum(linear.weight.numel() for linear in rest)


def invariant_work(invariant: nn.Module, dim: int, out_dim: int) -> float:
    """Of out_dim numbers W inv(x), x of width dim."""
    if isinstance(invariant, ByScalarGroup):  # half of the networks each
        return (invariant_work(invariant.sign, dim, out_dim) + invariant_work(invariant.scale, dim, out_dim)) / 2
    if not isinstance(invariant, SignInvariant):
        return dim * out_dim
    *inner, last = invariant.rho.linears
    return sum(linear.weight.numel() for linear in inner) + last.in_features * out_dim


def net_work(module: nn.Module, role: str, dim: int) -> float:
    """Of one row x of width dim in an equivariant net, or of what it is made of."""
    if isinstance(module, ByRole):
        return net_work(module.branches[module.index[role]], role, dim)
    if isinstance(module, ByScalarGroup):
        return (net_work(module.sign, role, dim) + net_work(module.scale, role, dim)) / 2
    if isinstance(module, MLPLayer):
        return mlp_work(module.mlp, dim)
    if isinstance(module, InvariantLayer):
        hidden = module.phi.linears[0].out_features
        return invariant_work(module.invariant, dim, hidden) + mlp_work(module.phi, 0)
    if isinstance(module, EquivariantLayer):
        return module.linear.weight.numel() + net_work(module.factor, role, dim)
    assert isinstance(module, EquivariantNet)
    work = sum(skip.weight.numel() for skip in module.skips)
    for layer in module.layers:
        work += net_work(layer, role, dim)
        dim = layer.linear.out_features if isinstance(layer, EquivariantLayer) else 0
    return work


def forward_work(model: ScaleGMN) -> float:
    """Of one network, forward."""
    spec, d = model.spec, model.config.hidden_dim
    sizes = [layer.in_dim * layer.out_dim for layer in spec.layers]
    backward_updated = model.config.symmetry in ("scale", "permutation") and model.layers[0].backward_edge_update
    work = 0.0
    for index, (layer, (reads, _)) in enumerate(zip(model.layers, model.reads, strict=True)):
        width, against_width = (d if index else spec.edge_dim), (d if index and backward_updated else spec.edge_dim)
        for message, step, offset, edge_width in (
            (layer.forward_message, -1, -1, width),
            (layer.backward_message, 1, 0, against_width),
        ):
            if message is None:
                continue
            pairs = [(n, n + step) for n in reads.nodes if 0 <= n + step <= spec.num_layers]
            work += sum(spec.layout[sender] for sender in {sender for _, sender in pairs}) * d * d
            for receiver, _ in pairs:
                if isinstance(message, ConcatMessage):
                    per_edge = mlp_work(message.mlp, edge_width)
                elif isinstance(message, ProductMessage):
                    per_edge = edge_width * d
                else:
                    per_edge = edge_width * d + net_work(message.net, spec.roles[receiver], d)
                work += sizes[receiver + offset] * per_edge
        parts = 3 if layer.bidirectional else 2
        for n in reads.nodes:
            work += spec.layout[n] * net_work(layer.update, spec.roles[n], parts * d)
            work += spec.layout[n] * (0 if layer.skip is None else d * d)
        for update, blocks, edge_width in (
            (layer.edge_update, reads.edges, width),
            (layer.backward_edge_update, reads.backward_edges, against_width),
        ):
            if update is None:
                continue
            ends = {block - 1 for block in blocks} | set(blocks)
            work += sum(spec.layout[n] for n in ends) * invariant_work(
                update.invariant, d, 2 * update.phi.linears[0].out_features
            )
            per_edge = edge_width * update.linear.out_features + mlp_work(update.phi, 0)
            work += sum(sizes[block - 1] for block in blocks) * per_edge
    return work + readout_work(model, d)


def readout_work(model: ScaleGMN, d: int) -> float:
    """Of one network."""
    readout, spec = model.readout, model.spec
    if readout is None:
        return 0
    if isinstance(readout, GraphReadout):
        own = sum(spec.layout[1:-1]) * net_work(readout.invariant_layer, "hidden", d)
        return own + sum(linear.weight.numel() for linear in readout.mlp.linears)
    if isinstance(readout, DeepSetReadout):
        return spec.num_nodes * mlp_work(readout.local_mlp, d) + sum(
            m.weight.numel() for m in readout.global_mlp.linears
        )
    projections = [readout.output_projection, readout.input_projection] if isinstance(readout, EndsReadout) else []
    linears = [m for part in (readout.mlp, *projections) for m in part.modules() if isinstance(m, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)


# Measurement


def random_networks(spec: NetSpec, num: int, device: torch.device) -> NetParams:
    """Networks with normal weights; mixed zoos alternate tanh and relu."""
    generator = torch.Generator().manual_seed(0)
    activation = None
    if spec.is_hetero:
        activation = torch.tensor([BUILT_IN.index(("tanh", "relu")[k % 2]) for k in range(num)])
    weights = [torch.randn(num, *layer.weight_shape, generator=generator) / layer.in_dim**0.5 for layer in spec.layers]
    biases = [torch.randn(num, layer.out_dim, generator=generator) for layer in spec.layers]
    return NetParams(spec, tuple(weights), tuple(biases), activation).to(device)


def mean_square(output: Tensor | NetParams) -> Tensor:
    """A loss for vectors and for changes of parameters."""
    parts = [output] if isinstance(output, Tensor) else [*output.weights, *output.biases]
    return torch.stack([part.square().mean() for part in parts]).sum()


def counted_work(model: Metanetwork) -> float:
    """Of one network, forward."""
    if isinstance(model, ScaleGMN):
        return forward_work(model)
    device, found = next(model.parameters()).device, []
    for num in (1, 2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(random_networks(model.spec, num, device))
        found.append(counter.get_total_flops() / 2)
    return found[1] - found[0]


def as_two(model: Metanetwork) -> Callable[[NetParams], Tensor]:
    """The model, passed networks as if every other one were of another architecture."""
    return lambda params: model.forward([params[::2], params[1::2]])


def build_step(
    model: Metanetwork, call: Callable, params: NetParams, arguments: argparse.Namespace
) -> Callable[[], None]:
    """One training step, or one forward pass, in which `call` says what the model says of networks."""
    device = params.biases[0].device
    parameters = [FlatParameters(model.parameters()).tensor]  # as the trainer does
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    at_once = model.networks_at_once(device)
    target = torch.zeros(len(params), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")

    def loss(part: NetParams, _: Tensor) -> Tensor:
        if arguments.compile:
            mark_batch_size_dynamic(part)
        with autocast:
            return mean_square(call(part))

    @torch.no_grad()
    def infer() -> None:
        loss(params, target)

    def train() -> None:
        optimizer.zero_grad(set_to_none=False)
        backward_in_micro_batches(loss, params, target, at_once)
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    model.train(not arguments.inference)
    return infer if arguments.inference else train


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: str, batch_size: int, arguments: argparse.Namespace) -> dict[str, object]:
    """The figures of one case."""
    device = torch.device(arguments.device)
    conf, spec, *overrides = CASES[case]
    torch.manual_seed(0)
    keep_freed_memory()
    settings = [f"scalegmn_args.{setting}" for setting in overrides]
    model = build_model(CONFIGS / conf, settings, spec).to(device)
    params = random_networks(spec, batch_size, device)
    call = torch.compile(model, fullgraph=True) if arguments.compile else model
    step, mixed_step = (build_step(model, way, params, arguments) for way in (call, as_two(model)))
    x, weight = torch.randn(17920, 128, device=device), torch.randn(128, 128, device=device)
    product, found = 2 * x.numel() * 128, torch.empty_like(x)
    timed(step, device)  # warm-up
    if arguments.profile:
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))

    def matrix_rate() -> float:
        """Operations per second of a matrix product."""
        return product * 10 / timed(lambda: [torch.mm(x, weight, out=found) for _ in range(10)], device)

    if arguments.mixed:
        timed(mixed_step, device)
    rates, steps, shares, mixed = [matrix_rate()], [], [], []
    for _ in range(arguments.rounds):
        steps.append(timed(step, device))
        rates.append(matrix_rate())
        shares.append(1 / (steps[-1] * (rates[-2] + rates[-1]) / 2))  # the machine's rate changes from second to second
        if arguments.mixed:
            mixed.append(timed(mixed_step, device) / steps[-1])
    rate, seconds = statistics.median(rates), statistics.median(steps)
    work = 2 * counted_work(model) * (1 if arguments.inference else 3)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "case": case,
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "compile": arguments.compile,
        "inference": arguments.inference,
        "networks_per_second": batch_size / seconds,
        "peak_gb": peak / 1e9,
        "work_gflop": work / 1e9,
        "matrix_gflops": rate / 1e9,
        "efficiency": work * batch_size * statistics.median(shares),
        **({"mixed_time": statistics.median(mixed)} if mixed else {}),
        "torch": torch.__version__,
    }


def report(call: tuple, line: str, out: Path | None) -> None:
    """Figures of (function, *arguments), called in a process of its own: printed as a line, appended as JSON."""
    function, *inputs = call
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        figures = pool.apply(function, inputs)
    print(line.format(**figures), flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def main() -> None:
    """Measures the chosen cases; each in a process of its own, so that peak memory is its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed; the median counts")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--inference", action="store_true", help="the forward pass alone")
    parser.add_argument("--profile", action="store_true", help="list the operators that take longest")
    parser.add_argument("--mixed", action="store_true", help="compare with the path of several architectures")
    parser.add_argument("--out", type=Path, help="append the figures to this JSONL file")
    arguments = parser.parse_args()
    for case in arguments.cases:
        for batch_size in arguments.batch_sizes:
            report(
                (measure, case, batch_size, arguments),
                "{case:<17} batch {batch_size:>4}  {networks_per_second:8.1f} networks/s  peak {peak_gb:5.2f} GB  "
                "{work_gflop:7.4f} GFLOP/network  matrix rate {matrix_gflops:6.0f} GFLOP/s  "
                "efficiency {efficiency:.2f}" + ("  mixed {mixed_time:.2f} x the time" if arguments.mixed else ""),
                arguments.out,
            )


if __name__ == "__main__":
    main()
