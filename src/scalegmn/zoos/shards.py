"""Parts of a zoo that is being made: shards are kept as they finish, and merged once all are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from scalegmn.networks import NetParams, NetSpec
from scalegmn.reporting.files import write_atomic, write_json
from scalegmn.zoos.zoo_format import Networks, write_zoo
from scalegmn.zoos.zoo_tensors import params_from_tensors, params_to_tensors


class Shards:
    """Numbered shards of a zoo in `<out>.partial`, next to where the zoo will be.

    Several processes may write shards of one zoo, on several machines with a common file system; one of them merges.

    Args:
        out: the zoo's folder.
        plan: the settings that determine the zoo, in plain JSON types; shards of different plans are never mixed. It is
            stored as `recipe` in the zoo's provenance.
        num_shards: the number of shards of the whole zoo.

    Raises:
        ValueError: `out`, or an unfinished zoo beside it, was made by another plan.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], num_shards: int) -> None:
        self.out, self.plan, self.num_shards = out, json.loads(json.dumps(plan)), num_shards
        self.folder = out.with_name(out.name + ".partial")
        if self.finished:
            self.discard()  # left over by a process that was killed while it discarded them
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = self.folder / "recipe.json"
        if recipe.exists() or any(self.folder.glob("shard-*")):
            _expect_recipe(recipe, self.plan, lambda content: content)
        else:
            write_json(recipe, self.plan)

    @property
    def finished(self) -> bool:
        """Whether the zoo of this plan is there; raises ValueError when something else is."""
        if not self.out.exists():
            return False
        _expect_recipe(self.out / "zoo.json", self.plan, lambda content: content["provenance"]["recipe"])
        return True

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there yet; none once the zoo is."""
        if self.finished:
            return []
        return [number for number in range(self.num_shards) if not self._file(number).exists()]

    def write(self, number: int, *nets: NetParams, **columns: Tensor) -> None:
        """Keeps a shard: its networks, one `NetParams` per architecture, and their columns."""
        tensors = {f"column.{name}": column for name, column in columns.items()}
        for group, params in enumerate(nets):
            tensors |= params_to_tensors(params, group)
        metadata = {"specs": json.dumps([params.spec.to_dict() for params in nets])}
        content = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata)
        write_atomic(self._file(number), content)

    def read(self, number: int) -> Networks:
        """A shard that is there."""
        with safe_open(self._file(number), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            specs = [NetSpec.from_dict(spec) for spec in json.loads(file.metadata()["specs"])]
        nets = tuple(params_from_tensors(spec, tensors, group) for group, spec in enumerate(specs))
        columns = {name.removeprefix("column."): t for name, t in tensors.items() if name.startswith("column.")}
        return Networks(nets, columns)

    def merge(
        self,
        splits: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
        draw: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Writes the zoo from all shards, unless another process has done so, and removes them.

        Args:
            splits: name -> numbers of networks, counted through the shards.
            provenance: plain JSON types.
            draw: adds figures to the zoo's folder.
        """
        with lock(self.out):
            if not self.finished:
                write_zoo(self.out, self, splits, {"recipe": self.plan, **provenance}, draw)
            self.discard()

    def __iter__(self) -> Iterator[Networks]:
        return map(self.read, range(self.num_shards))

    def discard(self) -> None:
        """Removes all shards."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"


@contextmanager
def lock(out: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Excludes other processes from making the zoo `out`, also those on other machines; it may be entered again by the
    process that holds it, and the system frees it when a process dies.

    Args:
        out: the zoo's folder.
        waiting: called when another process holds the lock.
    """
    file_lock = FileLock(out.with_name(out.name + ".lock"), is_singleton=True)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        waiting()
        file_lock.acquire()
    try:
        yield
    finally:
        if file_lock.lock_counter == 1 and not out.with_name(out.name + ".partial").exists():  # done, or given up
            Path(file_lock.lock_file).unlink(missing_ok=True)
        file_lock.release()


def _expect_recipe(path: Path, plan: dict[str, Any], read: Callable[[Any], Any]) -> None:
    """Raises ValueError unless the JSON file at `path` records this recipe."""
    try:
        recorded = read(json.loads(path.read_text()))
        different = [key for key in plan if recorded.get(key) != plan[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path.parent}: exists and is not a zoo of this recipe; choose another --out") from None
    if different:
        raise ValueError(
            f"{path.parent}: made by another recipe ({', '.join(f'{key} {recorded.get(key)}' for key in different)}); "
            "choose another --out or delete it"
        )
