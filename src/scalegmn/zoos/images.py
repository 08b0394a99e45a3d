"""Images to fit, edit and classify, from the files in which they are published.

An image's identity is its index here: training images first, then the source's own test images.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from scalegmn.zoos.pickled_arrays import read_pickle
from scalegmn.zoos.pictures import NoPicturesError, entries, read_pictures

CLASSES = {
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
"""The names of the published sources' classes; those of digits are their numbers."""


@dataclass(frozen=True)
class Images:
    """Images of one size with their classes.

    Attributes:
        pixels: [n, height, width, channels], uint8 (0 to 255) or float (0 to 1); `take` gives floats.
        labels: [n] classes.
        source: a description, with a checksum of pixels, classes and held-out set.
        held_out: [n] bool, the source's own test set; None where it has none.
        validation: [n] bool, its own validation set; None where it has none.
        keeps_split: whether these sets are kept whatever share a recipe gives to testing.
        classes: the names of the classes; None where they have only numbers.
        notes: what was recognised and what was passed over, a sentence each.
    """

    pixels: Tensor
    labels: Tensor
    source: str
    held_out: Tensor | None = None
    validation: Tensor | None = None
    keeps_split: bool = False
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many."""
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.pixels.shape[1:]
        return height, width, channels

    def take(self, rows: Tensor) -> Tensor:
        """Images `rows` as [len(rows), height, width, channels] floats in [0, 1]."""
        taken = self.pixels[rows]
        return taken.float() / 255 if taken.dtype == torch.uint8 else taken


def load_images(name: str, path: Path | None = None, background: str = "white") -> Images:
    """The images of a source.

    Args:
        name: a key of `SOURCES`.
        path: where its files are; not used for `digits`.
        background: the colour behind transparent pixels of pictures.

    Raises:
        ValueError: a file is missing, damaged or not what it should be; says which, and what is expected.
    """
    if name == "digits":
        return load_digits_images()
    if path is None:
        raise ValueError(f"images_path: found null, expected the path of the files of {name} (see data/README.md)")
    if not path.exists():
        raise ValueError(f"images_path: {path} does not exist, expected the path of the files of {name}")
    return SOURCES[name](path, background)


def load_digits_images() -> Images:
    """scikit-learn's handwritten digits: 1,797 x 8 x 8, grey, 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _images("scikit-learn digits", (digits.images / 16).astype(np.float32)[..., None], digits.target)


def load_idx_images(path: Path, classes: tuple[str, ...] | None = None) -> Images:
    """MNIST or Fashion-MNIST: the four published IDX files, plain or gzipped, in a folder, its `raw` or `MNIST/raw`.

    Args:
        path: the folder.
        classes: the names of the classes.
    """
    folders = [path / inside for inside in ("", "raw", "MNIST/raw", "FashionMNIST/raw")]
    pixels, labels = [], []
    for part in ("train", "t10k"):
        file = _idx_file(folders, f"{part}-images-idx3-ubyte")
        pixels.append(_read_idx(file, num_dims=3))
        labels_file = _idx_file(folders, f"{part}-labels-idx1-ubyte")
        labels.append(_read_idx(labels_file, num_dims=1))
        if pixels[-1].shape[1:] != (28, 28):
            raise ValueError(f"{file}: images of {pixels[-1].shape[1:]} pixels, expected (28, 28)")
        if len(labels[-1]) != len(pixels[-1]):
            raise ValueError(f"{labels_file}: {len(labels[-1])} labels, expected {len(pixels[-1])} as in {file.name}")
        _check_classes(labels_file, labels[-1])
    images = _images("IDX files", np.concatenate(pixels)[..., None], np.concatenate(labels), _second_part(labels))
    return replace(images, classes=classes)


def _idx_file(folders: list[Path], name: str) -> Path:
    """The first of the files `name` and `name.gz` in the folders, also with a dot as some tools unpack them:
    `train-images.idx3-ubyte`."""
    for folder in folders:
        for written in (name, name.replace("-idx", ".idx")):
            for file in (folder / written, folder / f"{written}.gz"):
                if file.exists():
                    return file
    raise ValueError(f"images_path: neither {name} nor {name}.gz in {folders[0]}, its raw or MNIST/raw; put it there")


def _read_idx(file: Path, num_dims: int) -> np.ndarray:
    """An IDX file of bytes. Header, big-endian: 0x0800 + number of dimensions, then each dimension."""
    length = 4 * (1 + num_dims)
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as content:
            header = content.read(length)
            if len(header) < length or struct.unpack(">i", header[:4])[0] != 0x0800 + num_dims:
                raise ValueError(f"begins with {header[:4].hex() or 'nothing'}, expected {0x0800 + num_dims:08x}")
            shape = struct.unpack(f">{num_dims}I", header[4:])
            expected, size = length + int(np.prod(shape, dtype=object)), _unpacked_size(file)
            if size != expected:
                raise ValueError(f"{size:,} bytes unpacked, expected {expected:,} for its header's shape {shape}")
            values = np.frombuffer(content.read(expected), np.uint8)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file}: not an IDX file of bytes or damaged ({error}); get it again") from None
    return values.reshape(shape)


def _unpacked_size(file: Path) -> int:
    """Bytes in a file, of a gzipped one as its last four bytes give it."""
    if file.suffix != ".gz":
        return file.stat().st_size
    with open(file, "rb") as content:
        content.seek(-4, io.SEEK_END)
        return struct.unpack("<I", content.read())[0]


def load_cifar10_images(path: Path, background: str = "white") -> Images:
    """CIFAR-10, 32 x 32 colour: a folder or tar archive of the published binary or Python batches, or of pictures.

    Batches: `data_batch_1` to `_5` and `test_batch`, each with or without `.bin`, in any folder within. Pictures:
    `train/<class>/*` and `test/<class>/*`. No code of a pickle runs (`pickled_arrays`).
    """
    batches = {}
    for name, content in entries(path, re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")):
        read = _binary_batch if name.suffix == ".bin" else _pickled_batch
        try:
            batches[name.stem] = read(content)
            _check_classes(name, batches[name.stem][1])
        except ValueError as error:
            raise ValueError(f"{path}: {name}: not a batch of CIFAR-10 ({error}); get it again") from None
    if not batches:
        try:
            images = load_picture_images(path, background)
        except NoPicturesError as error:
            raise ValueError(f"{error}; or CIFAR-10's batches, data_batch_1 to _5 and test_batch") from None
        if images.shape != (32, 32, 3):
            raise ValueError(f"{path}: images of {images.shape}, expected CIFAR-10's (32, 32, 3)")
        return images
    missing = {*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"} - set(batches)
    if missing:
        raise ValueError(f"{path}: {', '.join(sorted(missing))} missing of CIFAR-10's six batches; put them there")
    pixels, labels = zip(*(batches[name] for name in sorted(batches)), strict=True)  # test_batch last
    parts = [np.concatenate(labels[:-1]), labels[-1]]
    pixels = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    images = _images("CIFAR-10 batches", pixels, np.concatenate(parts), _second_part(parts))
    return replace(images, classes=CLASSES["cifar10"])


def _binary_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, 3072] and labels [n]; a record is one byte of label and 3 x 32 x 32 bytes of pixels."""
    if not content or len(content) % 3073:
        raise ValueError(f"{len(content):,} bytes, expected a multiple of 3,073")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


def _pickled_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, 3072] and labels [n] of a dictionary with `data` and `labels`."""
    batch = read_pickle(content)
    if not isinstance(batch, dict) or not isinstance(batch.get("data"), np.ndarray):
        raise ValueError("expected a dictionary with an array named data")
    pixels, labels = batch["data"], batch.get("labels")
    if pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise ValueError(f"data of shape {pixels.shape}, expected (images, 3072)")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise ValueError(f"labels: expected a list of {len(pixels)} integers")
    return pixels, np.array(labels)


def load_picture_images(path: Path, background: str = "white") -> Images:
    """Pictures of one size in a folder or tar archive, as `zoos.pictures` reads them."""
    pictures = read_pictures(path, background)
    split = None if pictures.splits is None else np.array(pictures.splits)
    images = _images(
        f"pictures in {len(pictures.classes)} folders",
        pictures.pixels,
        pictures.labels,
        None if split is None or "test" not in split else split == "test",
        None if split is None or "val" not in split else split == "val",
    )
    classes = pictures.classes if pictures.classes != ("",) else None
    return replace(images, classes=classes, keeps_split=split is not None, notes=pictures.notes)


def _check_classes(file: Path | PurePosixPath, labels: np.ndarray) -> None:
    """Raises ValueError unless all labels are from 0 to 9."""
    if not len(labels) or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{file}: labels {sorted(set(labels.tolist()))[-3:]}, expected at least one, all from 0 to 9")


def _second_part(parts: list[np.ndarray]) -> np.ndarray:
    """[n] bool: which rows come from the second of two parts."""
    return np.arange(sum(map(len, parts))) >= len(parts[0])


def _images(
    name: str,
    pixels: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray | None = None,
    validation: np.ndarray | None = None,
) -> Images:
    """Images with the checksum of what they hold in their source."""
    pixels, labels = np.ascontiguousarray(pixels), labels.astype(np.int64)
    digest = hashlib.sha256(repr((pixels.shape, str(pixels.dtype))).encode())
    for part in (pixels, labels, held_out, validation):
        if part is not None:
            digest.update(part.data)
    return Images(
        torch.from_numpy(pixels),
        torch.from_numpy(labels),
        f"{name}, {len(pixels):,} of {'x'.join(map(str, pixels.shape[1:]))}, sha256 {digest.hexdigest()}",
        None if held_out is None else torch.from_numpy(held_out),
        None if validation is None else torch.from_numpy(validation),
    )


SOURCES: dict[str, Callable[[Path, str], Images]] = {
    "digits": lambda path, background: load_digits_images(),
    "mnist": lambda path, background: load_idx_images(path),
    "fashion_mnist": lambda path, background: load_idx_images(path, CLASSES["fashion_mnist"]),
    "cifar10": load_cifar10_images,
    "folder": load_picture_images,
}
"""Image sources by name: where their files are, and the colour behind transparent pixels -> images."""
