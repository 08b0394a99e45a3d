"""Every format is written here byte by byte, and read back number by number."""

import gzip
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from image_files import encoded, idx, write_folder

from scalegmn.zoos.images import load_images
from scalegmn.zoos.pickled_arrays import read_pickle


@pytest.fixture
def random():
    return np.random.default_rng(0)


def write_idx(folder, random, suffix=""):
    """Five training and three test images; returns all pixels and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = random.integers(0, 256, (8, 28, 28)), random.integers(0, 10, 8)
    for part, rows in (("train", slice(5)), ("t10k", slice(5, 8))):
        for name, content in (("images-idx3", idx(pixels[rows])), ("labels-idx1", idx(labels[rows]))):
            packed = gzip.compress(content) if suffix else content
            (folder / f"{part}-{name}-ubyte{suffix}").write_bytes(packed)
    return pixels, labels


def short(text):
    """SHORT_BINSTRING: what Python 2 made of text."""
    return b"U" + bytes([len(text)]) + text


def pickled_batch(pixels, labels):
    """A batch as Python 2 wrote it: protocol 2, strings of bytes, numpy's reconstruction."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09" + short(b"b") + b"\x87Rq\x0a"
    )
    dtype = b"cnumpy\ndtype\nq\x0b" + short(b"u1") + b"K\x00K\x01\x87Rq\x0c(K\x03" + short(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86"
    array += b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<I", pixels.size) + pixels.tobytes() + b"tb"
    numbers = b"]q\x05(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = [short(b"batch_label"), short(b"one of 5"), short(b"labels"), numbers, short(b"data"), array]
    return b"\x80\x02}q\x01(" + b"".join(items) + b"u."


def binary_batch(pixels, labels):
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def batches(random, write, suffix):
    """Two images per batch: files by name, all pixels as planes, all labels."""
    pixels, labels = random.integers(0, 256, (12, 3072)).astype(np.uint8), random.integers(0, 10, 12)
    files = {
        name + suffix: write(pixels[2 * k : 2 * k + 2], labels[2 * k : 2 * k + 2]) for k, name in enumerate(BATCHES)
    }
    return files, pixels, labels


def picture(values, kind="PNG"):
    return encoded(values.squeeze(), kind)


def write_tar(path, files):
    kind = path.suffix.removeprefix(".").replace("tar", "")
    with tarfile.open(path, f"w:{kind}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def refuse(name, path, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_images(name, path)
    assert "\n" not in str(caught.value)


def test_digits():
    images = load_images("digits")
    assert images.shape == (8, 8, 1)
    assert len(images) == 1797
    assert images.held_out is None
    assert images.take(torch.arange(1797)).max() == 1


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_named_with_a_dot(tmp_path, random, suffix):
    pixels, labels = write_idx(tmp_path, random, suffix)
    for file in list(tmp_path.iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    images = load_images("fashion_mnist", tmp_path)
    np.testing.assert_array_equal(images.pixels[..., 0], pixels)
    assert images.labels.tolist() == labels.tolist()
    assert (images.classes[0], images.classes[9], len(images.classes)) == ("T-shirt/top", "Ankle boot", 10)
    assert load_images("mnist", tmp_path).classes is None


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx(tmp_path, random, suffix, inside, name):
    pixels, labels = write_idx(tmp_path / inside, random, suffix)
    images = load_images(name, tmp_path)
    assert images.shape == (28, 28, 1)
    np.testing.assert_array_equal(images.pixels[..., 0], pixels)
    assert images.labels.tolist() == labels.tolist()
    assert images.held_out.tolist() == [False] * 5 + [True] * 3
    taken = images.take(torch.tensor([6, 1]))
    np.testing.assert_allclose(taken[..., 0], pixels[[6, 1]] / 255, rtol=1e-6)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (IMAGES, None, f"neither {IMAGES} nor {IMAGES}.gz"),
        (IMAGES, b"", f"{IMAGES}.*begins with nothing, expected 00000803"),
        (IMAGES, b"PK\3\4" + bytes(100), "begins with 504b0304, expected 00000803"),
        (
            IMAGES,
            struct.pack(">4I", 0x803, 1 << 31, 28, 28) + bytes(784),
            r"800 bytes unpacked, expected 1,683,627,180,048",
        ),
        (IMAGES, idx(np.zeros((5, 28, 28)))[:-1], "3,935 bytes unpacked, expected 3,936"),
        (IMAGES, idx(np.zeros((5, 28, 28))) + b"x", "3,937 bytes unpacked, expected 3,936"),
        (IMAGES, idx(np.zeros((5, 8, 8))), r"images of \(8, 8\) pixels, expected \(28, 28\)"),
        (LABELS, idx(np.zeros(4)), "4 labels, expected 3 as in t10k-images"),
        (LABELS, idx(np.array([3, 10, 0])), "labels .* expected at least one, all from 0 to 9"),
    ],
)
def test_broken_idx_is_refused(tmp_path, random, packed, name, content, match):
    suffix = ".gz" if packed else ""
    write_idx(tmp_path, random, suffix)
    if content is None:
        (tmp_path / (name + suffix)).unlink()
    else:
        (tmp_path / (name + suffix)).write_bytes(gzip.compress(content) if packed else content)
    refuse("mnist", tmp_path, match)


def test_broken_gzip_is_refused(tmp_path, random):
    write_idx(tmp_path, random, ".gz")
    file = tmp_path / f"{IMAGES}.gz"
    content = file.read_bytes()
    for broken in (content[:1000] + content[-4:], b"", content[:50] + b"\xff" * 100 + content[150:]):
        file.write_bytes(broken)
        refuse("mnist", tmp_path, f"{IMAGES}.gz: not an IDX file")


@pytest.mark.parametrize(("write", "suffix"), [(pickled_batch, ""), (binary_batch, ".bin")])
@pytest.mark.parametrize("archive", ["", "batches.tar", "batches.tar.gz", "batches.tar.xz"])
def test_cifar10_batches(tmp_path, random, write, suffix, archive):
    files, planes, labels = batches(random, write, suffix)
    inside = {f"cifar-10-batches/{name}": content for name, content in [*files.items()][::-1]}
    path = write_tar(tmp_path / archive, inside) if archive else write_folder(tmp_path, inside)
    images = load_images("cifar10", path)
    assert images.shape == (32, 32, 3)
    np.testing.assert_array_equal(images.pixels, planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert images.labels.tolist() == labels.tolist()
    assert images.held_out.tolist() == [False] * 10 + [True] * 2
    assert images.classes[3] == "cat"


def test_handwritten_batch_is_a_pickle(random):
    """What `pickled_batch` writes is what Python's own reader takes for that dictionary."""
    pixels = random.integers(0, 256, (2, 3072)).astype(np.uint8)
    batch = pickle.loads(pickled_batch(pixels, [3, 9]), encoding="latin1")
    assert batch["labels"] == [3, 9]
    np.testing.assert_array_equal(batch["data"], pixels)
    np.testing.assert_array_equal(read_pickle(pickled_batch(pixels, [3, 9]))["data"], pixels)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_of_a_pickle_runs(tmp_path, random, protocol):
    files, _, _ = batches(random, pickled_batch, "")
    files["data_batch_3"] = pickle.dumps({"data": Runs(tmp_path / "ran"), "labels": [1]}, protocol)
    refuse(
        "cifar10", write_folder(tmp_path / "cifar", files), r"data_batch_3: not a batch of CIFAR-10 \(refused: holds"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content[:-40], "test_batch: not a batch"),
        (lambda content: b"", "test_batch: not a batch"),
        (lambda content: content.replace(b"U\x02u1", b"U\x02f8"), "array of f8"),
        (lambda content: content.replace(b"M\x00\x0c\x86", b"M\x00\x0d\x86"), r"shape \(2, 3328\), 6,144 bytes"),
        (lambda content: content.replace(b"labels", b"lapels"), "labels: expected a list of 2 integers"),
        (lambda content: content.replace(b"U\x04data", b"U\x04dato"), "array named data"),
        (lambda content: b"\x80\x02(K\x01K\x02u.", "not a readable pickle"),
        (lambda content: b"\x80\x02]q\x01.", "expected a dictionary"),
    ],
)
def test_broken_pickle_is_refused(tmp_path, random, change, match):
    files, _, _ = batches(random, pickled_batch, "")
    files["test_batch"] = change(files["test_batch"])
    refuse("cifar10", write_folder(tmp_path, files), match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x80\x02cnumpy\nndarray\nX\x03\x00\x00\x00abcb.", "not a readable pickle"),  # BUILD on a class
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.", "expected a dictionary"),
        (b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00x\x85R.", "refused: holds numpy.load"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "refused: holds os.system"),
        (b"\x80\x02X\x01\x00\x00\x00xQ.", "not a readable pickle"),  # a persistent id
        (b"\x80\x02" + b"(" * 100_000 + b".", "not a readable pickle"),
    ],
)
def test_hostile_pickle_is_refused(tmp_path, random, content, match):
    files, _, _ = batches(random, pickled_batch, "")
    files["test_batch"] = content
    refuse("cifar10", write_folder(tmp_path, files), match)


def test_broken_batches_are_refused(tmp_path, random):
    files, pixels, _ = batches(random, binary_batch, ".bin")
    short_file = {**files, "data_batch_2.bin": files["data_batch_2.bin"][:-1]}
    refuse(
        "cifar10", write_folder(tmp_path / "short", short_file), "data_batch_2.bin.*6,145 bytes, expected a multiple"
    )
    label = {**files, "data_batch_5.bin": binary_batch(pixels[:2], [4, 77])}
    refuse("cifar10", write_folder(tmp_path / "label", label), r"data_batch_5.bin: labels \[4, 77\]")
    files.pop("data_batch_4.bin")
    refuse("cifar10", write_folder(tmp_path / "missing", files), "data_batch_4 missing")
    whole = write_tar(tmp_path / "batches.tar.xz", files).read_bytes()
    (tmp_path / "batches.tar.xz").write_bytes(whole[: len(whole) // 2])
    refuse("cifar10", tmp_path / "batches.tar.xz", "whole tar archive")


@pytest.mark.parametrize("archive", ["", "pictures.tar", "pictures.tar.xz"])
def test_cifar10_pictures(tmp_path, random, archive):
    pixels = random.integers(0, 256, (4, 32, 32, 3))
    names = ["train/cat/0000.png", "train/cat/0001.png", "train/dog/0000.png", "test/dog/0000.png"]
    files = {name: picture(values) for name, values in zip(names, pixels, strict=True)}
    files = {f"cifar/{name}": files[name] for name in [*names][::-1]} | {"cifar/README": b"words"}
    path = write_tar(tmp_path / archive, files) if archive else write_folder(tmp_path / "pictures", files)
    images = load_images("cifar10", path)
    np.testing.assert_array_equal(images.pixels, pixels)
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.held_out.tolist() == [False, False, False, True]


def test_jpeg_is_read(tmp_path):
    files = {"train/a/0.jpg": picture(np.full((32, 32, 3), 100), "JPEG")}
    images = load_images("cifar10", write_folder(tmp_path, files))
    assert (images.pixels.int() - 100).abs().max() <= 1
    assert images.held_out is None


def test_folder_of_grey_images(tmp_path, random):
    pixels = random.integers(0, 256, (3, 5, 7, 1))
    names = ["b/x.png", "a/y.PNG", "a/z.png"]
    write_folder(tmp_path, {name: picture(values) for name, values in zip(names, pixels, strict=True)})
    images = load_images("folder", tmp_path)
    np.testing.assert_array_equal(images.pixels, pixels[[1, 2, 0]])
    assert images.labels.tolist() == [0, 0, 1]
    assert images.held_out is None
    again = load_images("folder", write_tar(tmp_path / "all.tar", {n: (tmp_path / n).read_bytes() for n in names}))
    assert again.source == images.source


def test_source_tells_contents_apart(tmp_path, random):
    pixels, _ = write_idx(tmp_path, random)
    before = load_images("mnist", tmp_path).source
    pixels[7, 27, 27] ^= 1
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(pixels[5:]))
    assert load_images("mnist", tmp_path).source != before


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "found no picture"),
        ({"notes.txt": b"words"}, "found no picture"),
        ({"a/1.png": picture(np.zeros((4, 4))), "a/2.png": picture(np.zeros((4, 5)))}, r"a/2.png has .* \(4, 5, 1\)"),
        (
            {"a/1.png": picture(np.zeros((4, 4))), "a/2.png": picture(np.zeros((4, 4, 3)))},
            r"a/2.png has .* \(4, 4, 3\)",
        ),
        ({"a/1.png": b"not a picture"}, "a/1.png: not a readable image"),
        ({"a/1.png": picture(np.arange(10000).reshape(100, 100))[:-100]}, "a/1.png: not a readable image"),
    ],
)
def test_unusable_folders_are_refused(tmp_path, files, match):
    refuse("folder", write_folder(tmp_path, files), match)


def test_missing_paths_are_named(tmp_path):
    refuse("mnist", None, "images_path: found null")
    refuse("folder", tmp_path / "none", "none does not exist")
    refuse(
        "cifar10",
        write_folder(tmp_path, {"a/1.png": picture(np.zeros((4, 4, 3)))}),
        r"expected CIFAR-10's \(32, 32, 3\)",
    )
    (tmp_path / "file").write_bytes(b"not a tar archive")
    refuse("folder", tmp_path / "file", "neither a folder nor a whole tar archive")
    refuse("mnist", tmp_path / "file", "neither train-images-idx3-ubyte nor")
