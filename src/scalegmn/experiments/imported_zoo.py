"""A zoo of one's own networks: files, and a table of their labels or scores."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from scalegmn.configuration.text import read_text
from scalegmn.interop.network_files import InputOptions, Source, read_source
from scalegmn.networks import ACTIVATIONS, NetParams, NetSpec
from scalegmn.reporting.files import natural_order, versions
from scalegmn.reporting.words import counted, said_once
from scalegmn.zoos.zoo_format import SPLIT_NAMES, Networks, Zoo, open_zoo, split_by_group, write_zoo

COLUMNS = ("name", "label", "score", "split", "group", "activation")
"""Columns of the table that are read."""

MISSING = ("", "nan", "NaN", "NA", "N/A", "<NA>", "null", "None")
"""What programs write where there is no value."""

SHOWN = 5
"""Problems in an error, of many."""


@dataclass(frozen=True)
class Table:
    """What is known of each network.

    Attributes:
        path: the file.
        rows: column -> value, a dictionary per network; cells are stripped, empty ones missing.
    """

    path: Path
    rows: list[dict[str, str]]

    @classmethod
    def read(cls, path: Path) -> Table:
        """The table in a CSV file, separated by commas, semicolons or tabs.

        Raises:
            ValueError: the file is missing or no such table; names the line.
        """
        try:
            text = read_text(path)
        except OSError:
            raise ValueError(f"{path}: no such file") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text in UTF-8 or UTF-16, expected a CSV file") from None
        try:
            return cls._parsed(path, text)
        except csv.Error as error:
            raise ValueError(f"{path}: not a CSV file ({error})") from None

    @classmethod
    def _parsed(cls, path: Path, text: str) -> Table:
        """The table in a text; raises ValueError, or csv.Error."""
        if "\0" in text or text.startswith("PK"):
            raise ValueError(f"{path}: not a CSV file (a table of a spreadsheet?); save it as CSV")
        first = text.lstrip().partition("\n")[0]
        separator = max(",;\t", key=first.count)
        header = [cell.strip() for cell in next(csv.reader([first], delimiter=separator), [])]
        header = [cell.lower() if cell.lower() in COLUMNS else cell for cell in header]
        expected = f"expected name, label or score, and perhaps {', '.join(COLUMNS[3:])}"
        if "name" not in header or not {"label", "score"} & {*header}:
            raise ValueError(f"{path}: found the columns {', '.join(header) or 'none'}, {expected}")
        twice = [name for name in COLUMNS if header.count(name) > 1]
        if twice:
            raise ValueError(f"{path}: found {header.count(twice[0])} columns {twice[0]}, expected one")
        rows = []
        reader = csv.reader(io.StringIO(text), delimiter=separator)
        is_first = True
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if is_first:
                    is_first = False
                    continue
                if len(cells) != len(header):
                    found = f"found {len(cells)} cells, expected {len(header)}"
                    raise ValueError(f"{path}: line {reader.line_num}: {found}")
                named = zip(header, map(str.strip, cells), strict=True)
                rows.append({name: cell for name, cell in named if cell not in MISSING and name in COLUMNS})
                broken = [name for name, cell in rows[-1].items() if not cell.isprintable()]
                if broken:
                    raise ValueError(f"{path}: line {reader.line_num}: {broken[0]} has a line break or a control sign")
        if not rows:
            raise ValueError(f"{path}: no networks, expected a line for each")
        for name in COLUMNS:
            missing = [row.get("name", f"network {k + 1}") for k, row in enumerate(rows) if name not in row]
            if name in header and name != "activation" and missing:
                raise ValueError(f"{path}: {name} is missing for {missing[0]} ({len(missing):,} in all)")
        return cls(path, rows)

    def __contains__(self, column: str) -> bool:
        return column in self.rows[0]

    def column(self, name: str) -> list[str]:
        """The cells of a column."""
        return [row[name] for row in self.rows]

    def classes(self) -> tuple[Tensor, list[str] | None]:
        """The class of each network, and the classes' names in their natural order; None where labels are numbers,
        which some programs write as 1.0 instead of 1.

        Raises:
            ValueError: they are decimals.
        """
        cells = self.column("label")
        if all(re.fullmatch(r"\d{1,9}(\.0*)?", cell) for cell in cells):
            return torch.tensor([int(cell.partition(".")[0]) for cell in cells]), None
        cells = [unicodedata.normalize("NFC", cell) for cell in cells]
        if all(re.fullmatch(r"[-+]?\d*\.\d+(e-?\d+)?|\d+", cell) for cell in cells):
            found = next(cell for cell in cells if "." in cell)
            raise ValueError(
                f"{self.path}: label: found {found}, expected classes: whole numbers from 0, or names; for numbers "
                "from 0 to 1 call the column score"
            )
        names = sorted({*cells}, key=natural_order)
        return torch.tensor([names.index(cell) for cell in cells]), names

    def scores(self) -> Tensor:
        """The score of each network, from 0 to 1.

        Raises:
            ValueError: one is no such number.
        """
        scores = []
        for row in self.rows:
            try:
                scores.append(float(row["score"]))
            except ValueError:
                scores.append(-1.0)
            if not 0 <= scores[-1] <= 1:
                raise ValueError(f"{self.path}: score of {row['name']}: found {row['score']}, expected 0 to 1")
        return torch.tensor(scores)

    def groups(self) -> Tensor:
        """The number of each network's group; without the column each is one of its own."""
        if "group" not in self:
            return torch.arange(len(self.rows))
        numbers = {name: number for number, name in enumerate(dict.fromkeys(self.column("group")))}
        return torch.tensor([numbers[cell] for cell in self.column("group")])

    def splits(self, fractions: Mapping[str, float], seed: int) -> dict[str, Tensor]:
        """The numbers of the networks of each split; without the column, groups are drawn.

        Raises:
            ValueError: the column has another word, or splits that share a group.
        """
        groups = self.groups()
        if "split" not in self:
            return split_by_group(groups, fractions, seed)
        cells = [cell.lower() for cell in self.column("split")]
        unknown = [cell for cell in cells if cell not in SPLIT_NAMES]
        if unknown:
            raise ValueError(f"{self.path}: split: found {unknown[0]}, expected {', '.join(SPLIT_NAMES)}")
        rows = {
            split: torch.tensor([k for k, cell in enumerate(cells) if SPLIT_NAMES[cell] == split]).long()
            for split in ("train", "val", "test")
        }
        for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = groups[rows[first]][torch.isin(groups[rows[first]], groups[rows[second]])]
            if len(shared):
                name = self.column("group")[int((groups == shared[0]).nonzero()[0])]
                raise ValueError(f"{self.path}: group {name} is in the splits {first} and {second}, expected in one")
        return rows


def import_zoo(
    sources: Sequence[Source],
    table: Table,
    options: InputOptions,
    out: Path,
    fractions: Mapping[str, float],
    seed: int,
) -> tuple[Zoo, list[str]]:
    """Writes a zoo of the networks of a table.

    Args:
        sources: where the networks may be.
        table: which of them, with labels (column `label` of the zoo), scores from 0 to 1 (column `test_accuracy`), or
            both; `group` becomes the column `image`: networks of one group are in one split.
        options: what files do not tell; the table's column `activation` wins.
        out: the zoo's folder.
        fractions: `val`, `test` -> share of the groups, where the table has no splits.
        seed: of their choice.

    Returns:
        The zoo, and what was assumed, a sentence each.

    Raises:
        ValueError: networks are missing or cannot be read, or the table is not what it should be.
            Nothing is written.
    """
    if out.exists():
        raise ValueError(f"--out: {out} exists already; choose another")
    splits = table.splits(fractions, seed)
    columns = {"image": table.groups()} if "group" in table else {}
    classes = None
    if "label" in table:
        columns["label"], classes = table.classes()
    if "score" in table:
        columns["test_accuracy"] = table.scores()
    chosen, notes = _matched(sources, table)
    nets = _read(chosen, table, options, notes)
    by_spec: dict[NetSpec, list[int]] = {}
    for row, params in enumerate(nets):
        by_spec.setdefault(params.spec, []).append(row)
    order = torch.tensor([row for rows in by_spec.values() for row in rows])
    parts = [
        Networks(
            (NetParams.cat([nets[row] for row in rows]),),
            {name: column[torch.tensor(rows)] for name, column in columns.items()},
        )
        for rows in by_spec.values()
    ]
    place = order.argsort()
    provenance = {
        "recipe": {"imported": _identity(chosen), "table": _digest(table.path), "seed": seed},
        **({} if classes is None else {"classes": classes}),
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_zoo(out, parts, {name: place[rows].sort().values for name, rows in splits.items()}, provenance)
    return open_zoo(out), notes


def _matched(sources: Sequence[Source], table: Table) -> tuple[list[Source], list[str]]:
    """The source of each row: that whose name, its end, or its absolute path, with or without suffix, is the row's."""
    by_name: dict[str, list[Source]] = {}
    for source in sources:
        parts = Path(source.name).parts
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        ends.append(str(Path(source.name).absolute()))
        for name in {*ends, *(_without_suffix(end) for end in ends), source.name}:
            by_name.setdefault(name, []).append(source)
    problems, chosen = [], []
    for row in table.rows:
        matches = by_name.get(row["name"].replace("\\", "/").removeprefix("./"), [])
        if len(matches) == 1:
            chosen.append(matches[0])
        else:
            found = (
                f"is {matches[0].name} and {matches[1].name}" if matches else "no file of the networks has this name"
            )
            problems.append(f"{table.path}: {row['name']}: {found}")
    twice = [source.name for source in {*chosen} if chosen.count(source) > 1]
    problems += [f"{table.path}: {name} stands in it more than once" for name in twice]
    _refuse(problems)
    others = len(sources) - len(chosen)
    return chosen, [f"{counted(others, 'network')} left out: not in {table.path}"] if others else []


def _read(sources: Iterable[Source], table: Table, options: InputOptions, notes: list[str]) -> list[NetParams]:
    """The networks, with batch norms folded; adds what was assumed to `notes`."""
    nets = []
    problems: dict[str, list[str]] = {}
    assumed: dict[str, list[str]] = {}
    for source, row in zip(tqdm(sources, unit=" networks", disable=None), table.rows, strict=True):
        activation = row.get("activation", options.activation)
        if activation is not None and activation not in ACTIVATIONS:
            where = f"{table.path}: activation" if "activation" in row else "--activation"
            raise ValueError(f"{where}: found {activation}, expected one of {', '.join(ACTIVATIONS)}")
        try:
            params, sentences = read_source(source.name, replace(options, activation=activation))
        except ValueError as error:
            problems.setdefault(str(error).removeprefix(f"{source.name}: "), []).append(source.name)
            continue
        nets.append(params.with_batch_norm_folded())
        for sentence in sentences:
            assumed.setdefault(sentence, []).append(source.name)
    _refuse(said_once(problems))
    notes += said_once(assumed)
    return nets


def _refuse(problems: Sequence[str]) -> None:
    """Raises ValueError with the first problems, if there are any."""
    if problems:
        more = f"; {len(problems) - SHOWN:,} more like these" if len(problems) > SHOWN else ""
        raise ValueError("; ".join(problems[:SHOWN]) + more)


def _without_suffix(name: str) -> str:
    """`a/net` of `a/net.pth`."""
    return re.sub(r"(\.[A-Za-z]+)+$", "", name)


def _identity(sources: Sequence[Source]) -> str:
    """A checksum of the files' names and contents."""
    total = hashlib.sha256()
    for source in sources:
        path = Path(source.name)
        total.update(source.name.encode())
        total.update(_digest(path).encode() if path.is_file() else b"code")
    return total.hexdigest()


def _digest(path: Path) -> str:
    """The checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
