"""Images to fit, edit and classify, from the files in which they are published.

An image's identity is its index here: training images first, then the source's own test images.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from scalegmn.zoos.pickled_arrays import read_pickle

PICTURES = re.compile(r".*\.(png|jpg|jpeg|bmp|webp)", re.IGNORECASE)
"""Names of the files that are taken for images."""


@dataclass(frozen=True)
class Images:
    """Images of one size with their classes.

    Attributes:
        pixels: [n, height, width, channels], uint8 (0 to 255) or float (0 to 1); `take` gives floats.
        labels: [n] classes.
        source: a description, with a checksum of pixels, classes and held-out set.
        held_out: [n] bool, the source's own test set; None where it has none.
    """

    pixels: Tensor
    labels: Tensor
    source: str
    held_out: Tensor | None = None

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


def load_images(name: str, path: Path | None = None) -> Images:
    """The images of a source.

    Args:
        name: a key of `SOURCES`.
        path: where its files are; not used for `digits`.

    Raises:
        ValueError: a file is missing, damaged or not what it should be; says which, and what is expected.
    """
    load = SOURCES[name]
    if load is load_digits_images:
        return load_digits_images()
    if path is None:
        raise ValueError(f"images_path: found null, expected where the files of images: {name} are (data/README.md)")
    if not path.exists():
        raise ValueError(f"images_path: {path} does not exist; expected where the files of images: {name} are")
    return load(path)


def load_digits_images() -> Images:
    """scikit-learn's handwritten digits: 1,797 x 8 x 8, grey, 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _images("scikit-learn digits", (digits.images / 16).astype(np.float32)[..., None], digits.target)


def load_idx_images(path: Path) -> Images:
    """MNIST or Fashion-MNIST: the four published IDX files, plain or gzipped, in a folder, its `raw` or `MNIST/raw`."""
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
    return _images("IDX files", np.concatenate(pixels)[..., None], np.concatenate(labels), _second_part(labels))


def _idx_file(folders: list[Path], name: str) -> Path:
    """The first of the files `name` and `name.gz` in the folders."""
    for folder in folders:
        for file in (folder / name, folder / f"{name}.gz"):
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


def load_cifar10_images(path: Path) -> Images:
    """CIFAR-10, 32 x 32 colour: a folder or tar archive of the published binary or Python batches, or of pictures.

    Batches: `data_batch_1` to `_5` and `test_batch`, each with or without `.bin`, in any folder within. Pictures:
    `train/<class>/*` and `test/<class>/*`. No code of a pickle runs (`pickled_arrays`).
    """
    batches = {}
    for name, content in _entries(path, re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")):
        read = _binary_batch if name.suffix == ".bin" else _pickled_batch
        try:
            batches[name.stem] = read(content)
            _check_classes(name, batches[name.stem][1])
        except ValueError as error:
            raise ValueError(f"{path}: {name}: not a batch of CIFAR-10 ({error}); get it again") from None
    if not batches:
        images = load_picture_images(path)
        if images.shape != (32, 32, 3):
            raise ValueError(f"{path}: images of {images.shape}, expected CIFAR-10's (32, 32, 3)")
        return images
    missing = {*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"} - set(batches)
    if missing:
        raise ValueError(f"{path}: {', '.join(sorted(missing))} missing of CIFAR-10's six batches; put them there")
    pixels, labels = zip(*(batches[name] for name in sorted(batches)), strict=True)  # test_batch last
    parts = [np.concatenate(labels[:-1]), labels[-1]]
    pixels = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _images("CIFAR-10 batches", pixels, np.concatenate(parts), _second_part(parts))


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


def load_picture_images(path: Path) -> Images:
    """A folder or tar archive of pictures of one size.

    A picture's class is the folder it is in, in sorted order; where all are in `train/<class>/` or `test/<class>/`, the
    latter are held out. Grey pictures have one channel, others three. Other files are ignored.
    """
    pictures = {name: _decode(name, content) for name, content in _entries(path, PICTURES)}
    if not pictures:
        raise ValueError(f"{path}: found no image, expected files that end in .png, .jpg, .jpeg, .bmp or .webp")
    parts = {name: name.parts[-3] if len(name.parts) > 2 else "" for name in pictures}
    has_parts = set(parts.values()) == {"train", "test"}
    names = sorted(pictures, key=lambda name: (has_parts and parts[name] == "test", name.parts))
    for name in names:
        if pictures[name].shape != pictures[names[0]].shape:
            raise ValueError(
                f"{path}: {name} has height, width, channels {pictures[name].shape}, expected "
                f"{pictures[names[0]].shape} as {names[0]}; make all images alike"
            )
    classes = sorted({name.parent.name for name in names})
    labels = np.array([classes.index(name.parent.name) for name in names])
    held_out = np.array([parts[name] == "test" for name in names]) if has_parts else None
    return _images(
        f"pictures in {len(classes)} folders", np.stack([pictures[name] for name in names]), labels, held_out
    )


def _decode(name: PurePosixPath, content: bytes) -> np.ndarray:
    """[height, width, channels] bytes of a picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.mode in ("1", "L", "LA"):
                return np.array(picture.convert("L"))[..., None]
            if picture.mode in ("P", "RGB", "RGBA", "CMYK", "YCbCr"):
                return np.array(picture.convert("RGB"))
            raise ValueError(f"pixels of type {picture.mode}, expected 8 bits grey or colour")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable image ({error}); remove or replace it") from None


def _entries(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Paths and contents of the files with a wanted name in a folder or, in one pass, a tar archive."""
    if path.is_dir():
        for file in path.rglob("*"):
            name = PurePosixPath(file.relative_to(path).as_posix())
            if wanted.fullmatch(name.name) and file.is_file():
                yield name, file.read_bytes()
        return
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isfile() and wanted.fullmatch(name.name):
                    content = archive.extractfile(member)
                    assert content is not None  # since it is a file
                    yield name, content.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: neither a folder nor a whole tar archive ({error}); get it again") from None


def _check_classes(file: Path | PurePosixPath, labels: np.ndarray) -> None:
    """Raises ValueError unless all labels are from 0 to 9."""
    if not len(labels) or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{file}: labels {sorted(set(labels.tolist()))[-3:]}, expected at least one, all from 0 to 9")


def _second_part(parts: list[np.ndarray]) -> np.ndarray:
    """[n] bool: which rows come from the second of two parts."""
    return np.arange(sum(map(len, parts))) >= len(parts[0])


def _images(name: str, pixels: np.ndarray, labels: np.ndarray, held_out: np.ndarray | None = None) -> Images:
    """Images with the checksum of what they hold in their source."""
    pixels, labels = np.ascontiguousarray(pixels), labels.astype(np.int64)
    digest = hashlib.sha256(repr((pixels.shape, str(pixels.dtype))).encode())
    for part in (pixels, labels, held_out):
        if part is not None:
            digest.update(part.data)
    return Images(
        torch.from_numpy(pixels),
        torch.from_numpy(labels),
        f"{name}, {len(pixels):,} of {'x'.join(map(str, pixels.shape[1:]))}, sha256 {digest.hexdigest()}",
        None if held_out is None else torch.from_numpy(held_out),
    )


SOURCES: dict[str, Callable[..., Images]] = {
    "digits": load_digits_images,
    "mnist": load_idx_images,
    "fashion_mnist": load_idx_images,
    "cifar10": load_cifar10_images,
    "folder": load_picture_images,
}
"""Image sources by name."""
