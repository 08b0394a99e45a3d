"""Folders and tar archives of pictures: their pixels as a viewer shows them, their classes, their own split."""

from __future__ import annotations

import io
import lzma
import re
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from scalegmn.reporting.words import kinds_counted
from scalegmn.zoos.picture_folders import ORDER, PictureFolders

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = re.compile(r".*\.(png|jpg|jpeg|bmp|webp|tif|tiff)", re.IGNORECASE)
"""Names of the files that are taken for pictures."""

KINDS = ".png, .jpg, .jpeg, .bmp, .webp, .tif or .tiff"
"""The same in words."""


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
        others: the suffix of each file that is not wanted, `without a suffix` or `hidden` -> how many there are.
    """

    folders: set[PurePosixPath] = field(default_factory=set)
    others: Counter[str] = field(default_factory=Counter)


def read_pictures(path: Path, background: str) -> Pictures:
    """The pictures in a folder or tar archive.

    Classes and splits are those of the folders (`PictureFolders`). Grey pictures have one channel, others three.

    Args:
        path: the folder or archive.
        background: the colour behind transparent pixels.

    Raises:
        ValueError: there is none, they differ in size, one is damaged, or their folders are half a split.
    """
    passed_over = Entries()
    pictures = {name: decode(name, content, background) for name, content in entries(path, PICTURES, passed_over)}
    not_read = kinds_counted(passed_over.others)
    if not pictures:
        found = f" ({not_read})" if not_read else ""
        raise NoPicturesError(f"{path}: found no picture{found}, expected files that end in {KINDS}")
    folders = PictureFolders.recognise(path, list(pictures), passed_over.folders)
    splits = folders.splits
    names = sorted(pictures, key=lambda name: (ORDER[splits[name]] if splits else 0, name.parts))
    for name in names:
        if pictures[name].shape != pictures[names[0]].shape:
            raise ValueError(
                f"{path}: {name} has height, width, channels {pictures[name].shape}, expected "
                f"{pictures[names[0]].shape} as {names[0]}; make all images alike"
            )
    classes, empty = folders.classes()
    notes = [f"{path}: not read: {not_read}"] if not_read else []
    if empty:
        notes.append(f"{path}: no pictures in {', '.join(empty)}; other classes keep their numbers")
    return Pictures(
        np.stack([pictures[name] for name in names]),
        np.array([classes.index(folders.class_of(name)) for name in names]),
        tuple(classes),
        tuple(splits[name] for name in names) if splits else None,
        (*notes, *folders.notes()),
    )


def decode(name: PurePosixPath, content: bytes, background: str) -> np.ndarray:
    """A picture as a viewer shows it, [height, width, channels] bytes: turned as its EXIF orientation says, and on a
    background where it is transparent, whose brightness counts for grey pictures.

    Raises:
        ValueError: it is damaged, holds several pictures, or has other pixels than 8 bits grey or colour.
    """
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about entries of damaged files, in several lines
            return _pixels(content, background)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not a readable image (no picture, or a damaged one); replace or remove it") from None
    except Exception as error:  # decoders raise what they like about damaged pictures
        raise ValueError(f"{name}: not a readable image ({error}); convert, replace or remove it") from None


def _pixels(content: bytes, background: str) -> np.ndarray:
    """What `decode` returns."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as picture:
        number = getattr(picture, "n_frames", 1)
        if number > 1 and picture.format != "MPO":  # of cameras: the first is the picture
            raise ValueError(f"{number} pictures in one file, expected one")
        is_grey = picture.mode in ("1", "L", "LA", "La")
        if not is_grey and picture.mode not in ("P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"):
            raise ValueError(f"pixels of type {picture.mode}, expected 8 bits grey or colour")
        shown = _on_background(ImageOps.exif_transpose(picture), background)
        return np.array(shown.convert("L"))[..., None] if is_grey else np.array(shown.convert("RGB"))


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
                passed_over.others[name.suffix or "without a suffix"] += 1
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
