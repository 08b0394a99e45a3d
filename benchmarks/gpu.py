"""Is this package right on a GPU, and how fast: correctness, training steps, a short training run.

python benchmarks/gpu.py [--device cuda] [--cases mnist_bidir ...] [--compiled_cases mnist_bidir ...]
    [--batch_sizes 64 512] [--rounds 5] [--epochs 4] [--accuracy 0.95] [--out FOLDER]

FOLDER gets gpu.json, all figures, and gpu.md, their tables. On a CPU (--device cpu, with small batches) all but CUDA
graphs runs too.

- Golden outputs: the largest difference to the published code's outputs (tests/fixtures, float64), relative to the
  spread between networks, in float64 and float32.
- Symmetry: the largest change of the output over random elements of the group, relative to that spread, per precision.
- Steps: forward, backward, clipping and AdamW (fused) on random networks, as in step_time.py. `eager`: as it is.
  `graph`: the eager step, recorded once as a CUDA graph and replayed. `compiled`: torch.compile of the model.
  `compiled graph`: the compiled step, recorded. Operators: what a step asks of PyTorch, views aside. Kernels: of eager
  and compiled steps, what the profiler sees on a GPU; on a CPU, of compiled models, the calls in the generated code of
  forward and backward, without the optimiser.
- Training: epochs and seconds until `--conf` reaches an accuracy on the validation split.

A mode that fails has its error in the table.
"""

import argparse
import csv
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from step_time import CASES, CONFIGS, build_step, random_networks, timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scalegmn.experiments.config import build_model
from scalegmn.interop.published_checkpoints import load_published_checkpoint
from scalegmn.models.scalegmn import ScaleGMN
from scalegmn.networks import NetParams
from scalegmn.symmetry.measure import invariance_error, spread
from scalegmn.training.memory import keep_freed_memory

ROOT = Path(__file__).parents[1]
SYMMETRIC = ("mnist_forward", "mnist_bidir", "relu_cnn_forward", "relu_cnn_bidir", "ng_gnn", "mlp")
"""Cases whose invariance is measured: ScaleGMN's to its group, that of others to permutations; `mlp`, which has no
symmetry, is the control."""

PRECISIONS = ("float64", "fp32", "tf32", "bf16")


def numbers(output: Tensor | NetParams) -> Tensor:
    """[B, numbers] of vectors, or of changes of parameters."""
    parts = [output] if isinstance(output, Tensor) else [*output.weights, *output.biases]
    return torch.cat([part.flatten(1) for part in parts], 1)


def golden(device: torch.device) -> list[dict[str, Any]]:
    """Of each file of the published ScaleGMN's outputs, the error per precision."""
    rows = []
    for path in sorted((ROOT / "tests" / "fixtures").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            case = json.loads(file.metadata()["case"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
        layers = range(len(case["layer_layout"]) - 1)
        weights, biases = ([tensors[f"input.{kind}.{k}"] for k in layers] for kind in ("weight", "bias"))
        names = [f"output.{kind}.{k}" for kind in ("weight", "bias") for k in layers]
        editing = case["scalegmn_args"]["equivariant"]
        expected = torch.cat([tensors[name].flatten(1) for name in (names if editing else ["output"])], 1)
        model = load_published_checkpoint(case["scalegmn_args"], state).to(device)
        params = NetParams.from_tensors(weights, biases, case["activations"]).to(device)
        row = {"file": path.stem}
        for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
            with torch.no_grad():
                found = numbers(model.to(dtype)(params.map(lambda x, dtype=dtype: x.to(dtype)))).cpu().double()
            row[name] = (found - expected).abs().max().item() / spread(expected)
        rows.append(row)
    return rows


def symmetry(device: torch.device, batch_size: int) -> list[dict[str, Any]]:
    """Of each case in `SYMMETRIC`, `invariance_error` per precision."""
    rows = []
    for case in SYMMETRIC:
        conf, spec, *_ = CASES[case]
        torch.manual_seed(0)
        model = build_model(CONFIGS / conf, [], spec).to(device).eval()
        params = random_networks(spec, batch_size, device)
        row: dict[str, Any] = {"case": case}
        for precision in PRECISIONS:
            dtype = torch.float64 if precision == "float64" else torch.float32
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            moved, networks = model.to(dtype), params.map(lambda x, dtype=dtype: x.to(dtype))
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                generator = torch.Generator().manual_seed(0)
                error = invariance_error(
                    lambda nets, moved=moved: moved(nets).double(),
                    networks,
                    generator,
                    scale=isinstance(model, ScaleGMN),
                )
            row[precision] = error if precision != "tf32" or device.type == "cuda" else None
        torch.backends.cuda.matmul.allow_tf32 = False
        rows.append(row)
    return rows


class CountOperators(TorchDispatchMode):
    """Counts the operators that compute something: views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def kernels_seen(step: Callable[[], None]) -> int:
    """The kernels and copies that a step starts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


CALL = re.compile(r"^\s+(?:\w+ = )?(?:cpp_\w+\(|\w+\.run\(|extern_kernels\.\w+\(|torch\.ops\.(?!inductor)\S+\()", re.M)
"""A kernel's call in generated code."""


def kernels_generated(codes: list[str]) -> int:
    """The calls of kernels in the code that torch.compile generates."""
    return sum(len(CALL.findall(code[code.index("def call") :])) for code in codes)


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step: replays it without Python or launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def steps(case: str, modes: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of a case's training step in each mode, at each batch size and in each precision."""
    keep_freed_memory()
    settings = itertools.product(modes, arguments.batch_sizes, ("fp32", "bf16"))
    return [measure(case, *setting, arguments) for setting in settings]


def measure(case: str, mode: str, batch_size: int, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a training step."""
    figures: dict[str, Any] = {"case": case, "mode": mode, "batch_size": batch_size, "precision": precision}
    device = torch.device(arguments.device)
    conf, spec, *overrides = CASES[case]
    torch.manual_seed(0)
    compiles = mode.startswith("compiled")
    try:
        model = build_model(CONFIGS / conf, [f"scalegmn_args.{setting}" for setting in overrides], spec).to(device)
        call: Callable = torch.compile(model, fullgraph=True) if compiles else model
        options = argparse.Namespace(precision=precision, compile=compiles, inference=False)
        step = build_step(model, call, random_networks(spec, batch_size, device), options)
        start, codes = time.perf_counter(), []
        if compiles and device.type == "cpu":
            from torch._inductor.utils import run_and_get_code

            codes = run_and_get_code(step)[1]
        timed(step, device)
        figures["first_seconds"] = time.perf_counter() - start
        if not compiles:
            with CountOperators() as operators:
                step()
            figures["operators"] = operators.count
        if device.type == "cuda":
            figures["kernels"] = kernels_seen(step)
            torch.cuda.reset_peak_memory_stats()
        elif codes:
            figures["kernels"] = kernels_generated(codes)
        if mode.endswith("graph"):
            step = recorded(step)
        seconds = median(timed(step, device) for _ in range(arguments.rounds))
        figures["networks_per_second"] = batch_size / seconds
        figures["step_ms"] = 1e3 * seconds
        if device.type == "cuda":
            figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    except Exception as error:  # a mode may be out of a machine's reach; the others are still measured
        figures["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return figures


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Epochs and seconds until a run reaches an accuracy on the validation split; makes its zoo."""
    run, zoo = arguments.out / "run", arguments.out / "zoo"
    program = [sys.executable, "-m", "scalegmn"]
    if not zoo.exists():
        views = ["--views", str(arguments.views)]
        subprocess.run([*program, "zoo", "inr", "--conf", "zoos/digits_inr.yml", *views, "--out", str(zoo)], check=True)
    settings = ["--train_args.num_epochs", str(arguments.epochs), "--train_args.device", arguments.device]
    where = ["--data.dataset_path", str(zoo), "--run_dir", str(run), "--resume", "auto"]
    subprocess.run([*program, "train", "classification", "--conf", arguments.conf, *settings, *where], check=True)
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reached = [row for row in rows if float(row["val_accuracy"]) >= arguments.accuracy]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "conf": arguments.conf,
        "accuracy": arguments.accuracy,
        "epochs": int(reached[0]["epoch"]) + 1 if reached else None,
        "seconds": float(reached[0]["seconds"]) if reached else None,
        "networks_per_second": float(rows[-1]["networks_per_second"]),
        "test_accuracy": summary["test_accuracy"],
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """A value in a table."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "\\|")


def main() -> None:
    """Measures and writes; what is measured is written at once, so that nothing is lost when the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="eager steps; all by default")
    parser.add_argument("--compiled_cases", nargs="*", choices=CASES, default=["mnist_bidir", "relu_cnn_bidir"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed; the median counts (5)")
    parser.add_argument("--conf", default="digits_cls/scalegmn_probes.yml", help="of the training run")
    parser.add_argument("--views", type=int, default=8, help="INRs per image in its zoo (8)")
    parser.add_argument("--epochs", type=int, default=4, help="of it (4); 0: no run")
    parser.add_argument("--accuracy", type=float, default=0.95, help="that it is to reach (0.95)")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder (gpu)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: found no CUDA device; use --device cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Any] = {"machine": [machine(device)]}

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        sections[name] = rows
        (arguments.out / "gpu.json").write_text(json.dumps(sections, indent=1) + "\n")
        text = "\n\n".join(f"## {title}\n\n{table(found)}" for title, found in sections.items())
        (arguments.out / "gpu.md").write_text(text + "\n")

    write("golden outputs", golden(device))
    write("symmetry", symmetry(device, min(64, arguments.batch_sizes[0])))
    if arguments.epochs:
        write("training", [train(arguments)])
    rows: list[dict[str, Any]] = []
    modes = 2 if device.type == "cuda" else 1
    plan = [(case, ["compiled", "compiled graph"][:modes]) for case in arguments.compiled_cases]
    plan += [(case, ["eager", "graph"][:modes]) for case in arguments.cases]
    for case, names in plan:
        print(f"{case}: {', '.join(names)}", flush=True)
        with torch.multiprocessing.get_context("spawn").Pool(1) as pool:  # a crash of one leaves the others
            rows += pool.apply(steps, (case, names, arguments))
        write("training steps", rows)


if __name__ == "__main__":
    main()
