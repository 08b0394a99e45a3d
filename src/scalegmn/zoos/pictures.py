"""Folders and tar archives of pictures: their pixels as a viewer shows them, their classes, their own split."""

from __future__ import annotations

import io
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from scalegmn.reporting.files import natural_order
from scalegmn.reporting.words import counted
from scalegmn.zoos.zoo_format import SPLIT_NAMES

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = re.compile(r".*\.(png|jpg|jpeg|bmp|webp|tif|tiff)", re.IGNORECASE)
"""Names of the files that are taken for pictures."""

KINDS = ".png, .jpg, .jpeg, .bmp, .webp, .tif or .tiff"
"""The same in words."""

ORDER = {"train": 0, "val": 1, "test": 2}
"""The order of the pictures of a split folder: those of the training folder come first."""


class NoPicturesError(ValueError):
    """A folder or archive holds no picture at all."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size.

    Attributes:
        pixels: [n, height, width, channels], bytes.
        labels: [n] numbers of classes.
        classes: their names: folders in natural order (2 before 10), those without a readable picture too.
        splits: `train`, `val` or `test` of each picture; None: the folder has no split of its own.
        notes: what was recognised and what was passed over, a sentence each.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    splits: tuple[str, ...] | None
    notes: tuple[str, ...]


@dataclass
class Entries:
    """What a folder or archive holds besides the files that are wanted.

    Attributes:
        folders: all folders but hidden ones.
        others: the suffix of each file that is not wanted, or `hidden` -> how many there are.
    """

    folders: set[PurePosixPath] = field(default_factory=set)
    others: Counter[str] = field(default_factory=Counter)


def read_pictures(path: Path, background: str) -> Pictures:
    """The pictures in a folder or tar archive.

    A picture's class is the folder that it is in. Folders `train` (`training`), `val` (`valid`, `validation`) and
    `test` (`testing`) around the folders of classes, or around the pictures, are a split. Grey pictures have one
    channel, others three.

    Args:
        path: the folder or archive.
        background: the colour behind transparent pixels.

    Raises:
        ValueError: there is none, they differ in size, one is damaged, or some are outside of a split's folders.
    """
    passed_over = Entries()
    pictures = {name: decode(name, content, background) for name, content in entries(path, PICTURES, passed_over)}
    not_read = ", ".join(f"{number:,} {kind}" for kind, number in sorted(passed_over.others.items()))
    if not pictures:
        found = f" ({not_read})" if not_read else ""
        raise NoPicturesError(f"{path}: found no picture{found}, expected files that end in {KINDS}")
    split_of, has_classes = _splits(path, list(pictures))
    names = sorted(pictures, key=lambda name: (ORDER[split_of[name]] if split_of else 0, name.parts))
    for name in names:
        if pictures[name].shape != pictures[names[0]].shape:
            raise ValueError(
                f"{path}: {name} has height, width, channels {pictures[name].shape}, expected "
                f"{pictures[names[0]].shape} as {names[0]}; make all images alike"
            )
    class_of = {name: name.parent.name if has_classes else "" for name in names}
    classes, empty = _classes(class_of, passed_over.folders if has_classes else ())
    notes = [f"{path}: not read: {not_read}"] if not_read else []
    if empty:
        notes.append(f"{path}: no pictures in {', '.join(empty)}; other classes keep their numbers")
    places = sorted({name.parent for name in names})
    if not split_of and len({place.parent for place in places}) > 1:
        examples = ", ".join(map(str, places[:4])) + (", .." if len(places) > 4 else "")
        notes.append(f"{path}: a picture's class is the folder that it is in, and these are in several: {examples}")
    if split_of:
        counts = Counter(split_of.values())
        sizes = ", ".join(f"{split} ({counted(counts[split], 'picture')})" for split in ORDER if counts[split])
        notes.append(f"{path}: found the folders of a split, {sizes}; networks are split as their pictures are")
        trained = {class_of[name] for name in names if split_of[name] == "train"}
        unseen = [name for name in classes if name in class_of.values() and name not in trained]
        if unseen:
            notes.append(f"{path}: no training picture of {', '.join(unseen)}; check the names of the classes' folders")
    return Pictures(
        np.stack([pictures[name] for name in names]),
        np.array([classes.index(class_of[name]) for name in names]),
        tuple(classes),
        tuple(split_of[name] for name in names) if split_of else None,
        tuple(notes),
    )


def _classes(
    class_of: Mapping[PurePosixPath, str], folders: Sequence[PurePosixPath] | set[PurePosixPath]
) -> tuple[list[str], list[str]]:
    """The names of all classes, and those without pictures: folders beside those with pictures."""
    depths = {len(name.parts) - 1 for name in class_of}
    used = {*class_of.values()}
    classes = sorted(used | {folder.name for folder in folders if len(folder.parts) in depths}, key=natural_order)
    return classes, [name for name in classes if name not in used]


def _splits(path: Path, names: Sequence[PurePosixPath]) -> tuple[dict[PurePosixPath, str], bool]:
    """The split of each picture, none where folders are no split, and whether pictures are in folders of classes.

    Raises:
        ValueError: only some are in the folders of a split.
    """
    for has_classes in (True, False):
        split_of: dict[PurePosixPath, str] = {}
        for name in names:
            folders = name.parts[:-2] if has_classes else name.parts[-2:-1]
            words = [SPLIT_NAMES[folder.lower()] for folder in folders if folder.lower() in SPLIT_NAMES]
            split_of |= {name: words[-1]} if words else {}
        if "train" in split_of.values() and len({*split_of.values()}) > 1:
            outside = [name for name in names if name not in split_of]
            if not outside:
                return split_of, has_classes
            if has_classes:
                split = " and ".join(sorted({*split_of.values()}, key=ORDER.__getitem__))
                raise ValueError(
                    f"{path}: found folders {split}, and {outside[0]} outside of them ({len(outside):,} in all); move "
                    "these into one of them, or rename the folders if they are no split"
                )
    return {}, True


def decode(name: PurePosixPath, content: bytes, background: str) -> np.ndarray:
    """A picture as a viewer shows it, [height, width, channels] bytes: turned as its EXIF orientation says, and on a
    background where it is transparent, whose brightness counts for grey pictures.

    Raises:
        ValueError: it is damaged, holds several pictures, or has other pixels than 8 bits grey or colour.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            number = getattr(picture, "n_frames", 1)
            if number > 1 and picture.format != "MPO":  # of cameras: the first is the picture
                raise ValueError(f"{number} pictures in one file, expected one")
            is_grey = picture.mode in ("1", "L", "LA", "La")
            if not is_grey and picture.mode not in ("P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"):
                raise ValueError(f"pixels of type {picture.mode}, expected 8 bits grey or colour")
            shown = _on_background(ImageOps.exif_transpose(picture), background)
            return np.array(shown.convert("L"))[..., None] if is_grey else np.array(shown.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not a readable image (no picture, or a damaged one); replace or remove it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable image ({error}); convert, replace or remove it") from None


def is_colour(name: str) -> bool:
    """Whether a text names an opaque colour: `white`, `#ff8000`."""
    from PIL import ImageColor

    try:
        return len(ImageColor.getrgb(name)) == 3
    except ValueError:
        return False


def _on_background(picture: Image, background: str) -> Image:
    """A picture without transparency."""
    from PIL import Image

    if picture.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in picture.info:
        return picture
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert(picture.mode.upper())
    is_grey = picture.mode in ("1", "L", "LA")
    canvas = Image.new("L" if is_grey else "RGB", picture.size, background).convert("RGBA")
    return Image.alpha_composite(canvas, picture.convert("RGBA"))


def entries(
    path: Path, wanted: re.Pattern[str], passed_over: Entries | None = None
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Paths and contents of the files with a wanted name in a folder or, in one pass, a tar archive; hidden ones, as
    macOS puts beside pictures, are left out.

    Args:
        path: the folder or archive.
        wanted: matches whole names.
        passed_over: gets what else there is.
    """
    passed_over = passed_over or Entries()

    def is_wanted(name: PurePosixPath, is_file: bool) -> bool:
        is_hidden = any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in name.parts)
        if is_hidden:
            passed_over.others["hidden"] += is_file
        else:
            passed_over.folders.update(name.parents if is_file else (name, *name.parents))
            if is_file and not wanted.fullmatch(name.name):
                passed_over.others[name.suffix or name.name] += 1
        return is_file and not is_hidden and wanted.fullmatch(name.name) is not None

    if path.is_dir():
        for file in path.rglob("*"):
            name = PurePosixPath(file.relative_to(path).as_posix())
            if is_wanted(name, file.is_file()):
                yield name, file.read_bytes()
        return
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if is_wanted(name, member.isfile()):
                    content = archive.extractfile(member)
                    assert content is not None  # since it is a file
                    yield name, content.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: neither a folder nor a whole tar archive ({error}); get it again") from None
