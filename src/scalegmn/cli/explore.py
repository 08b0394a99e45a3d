"""`scalegmn explore ZOO|RUN|NETWORK... --out page.html`: one page that shows networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.explore.content import NETWORKS, collections_of
from scalegmn.explore.maps import MAPS
from scalegmn.explore.page import MARK, page
from scalegmn.explore.serve import ADDRESS, server_of
from scalegmn.interop.network_files import InputOptions
from scalegmn.interop.torch_modules import ExampleInput
from scalegmn.reporting.files import write_atomic
from scalegmn.reporting.words import counted


def run(words: Sequence[str]) -> None:
    """Writes the page; with `--serve` shows it until the process is interrupted."""
    parser = Arguments("scalegmn explore", "Write one HTML page that shows zoos, runs or networks.")
    parser.add_argument("names", nargs="+", metavar="ZOO|RUN|NETWORK", help="a zoo, a run or bundle, or networks")
    parser.add_argument("--out", type=Path, default=Path("page.html"), help="the page (page.html)")
    parser.add_argument("--networks", type=int, default=NETWORKS, metavar="N", help=f"of each zoo ({NETWORKS})")
    parser.add_argument("--map", choices=MAPS, default="pca", help="principal components, or UMAP, an extra (pca)")
    parser.add_argument("--activation", metavar="NAME", help="of networks in state dicts")
    parser.add_argument("--w0", type=float, default=30.0, help="the frequency of their sines (30)")
    parser.add_argument("--layers", help="the layers of a state dict in their order: a,b,c")
    parser.add_example_input()
    parser.add_argument("--serve", type=int, metavar="PORT", help="show it on this machine alone; 0: any free port")
    values = parser.read(words)
    if values.networks < 1:
        raise ValueError(f"--networks: found {values.networks}, expected at least 1")
    if values.serve is not None and not 0 <= values.serve < 2**16:
        raise ValueError(f"--serve: found {values.serve}, expected a port from 0 to 65535")
    if values.out.is_dir():
        raise ValueError(f"--out: {values.out} is a folder, expected a file such as page.html")
    if values.out.exists() and MARK.encode() not in values.out.read_bytes()[:500]:
        raise ValueError(f"--out: {values.out} exists already, and is no page of scalegmn explore")
    layers = None if values.layers is None else tuple(values.layers.split(","))
    options = InputOptions(values.activation, values.w0, ExampleInput.parse(values.input_shape, values.words), layers)
    collections = collections_of(values.names, options, values.networks, values.map)
    text = page(collections)
    values.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(values.out, text)
    number = counted(sum(len(collection.names) for collection in collections), "network")
    print(f"{values.out}: {number}, {len(text) / 1e6:.1f} MB; open it in a browser")
    if values.serve is not None:
        with server_of(text, values.serve) as server:
            print(f"http://{ADDRESS}:{server.server_port}/ until Ctrl+C", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()
