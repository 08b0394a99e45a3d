"""Pictures as people have them: turned, transparent, in folders of classes and of splits, beside other files."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import encoded
from image_files import write_folder as write
from PIL import Image

from scalegmn.tasks.editing import original_images
from scalegmn.zoos.fit.cnn_zoo import CnnRecipe, make_cnn_zoo
from scalegmn.zoos.fit.inr_zoo import InrRecipe, make_zoo
from scalegmn.zoos.images import load_images
from scalegmn.zoos.loader import DataConfig
from scalegmn.zoos.zoo_format import open_zoo

COLOURS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
"""Two rows of three pixels."""


def grey(value, size=(8, 8)):
    return encoded(np.full(size, value))


def values(images):
    """The first value of each image."""
    return images.pixels[:, 0, 0, 0].tolist()


TURNED = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: COLOURS.transpose(1, 0, 2)[:, ::-1],
    8: COLOURS.transpose(1, 0, 2)[::-1],
}
"""EXIF orientation -> what a viewer shows: 6 is turned to the right, 8 to the left."""


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    write(tmp_path, {f"a/1.{kind.lower()}": encoded(COLOURS, kind, exif=exif, **options)})
    np.testing.assert_array_equal(load_images("folder", tmp_path).pixels[0], TURNED[orientation])


def test_turned_pictures_are_of_one_size(tmp_path):
    """Of a camera held upright: stored as 2 x 3, shown as 3 x 2."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = encoded(COLOURS.transpose(1, 0, 2))
    write(tmp_path, {"a/1.jpg": encoded(COLOURS, "JPEG", exif=exif), "a/2.png": upright})
    assert load_images("folder", tmp_path).shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("background", "behind"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#ff8000", (255, 128, 0))]
)
def test_transparent_colours(tmp_path, background, behind):
    """Opaque, half and fully transparent pixels: alpha x + (1 - alpha) background."""
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 128], [200, 100, 0, 0]]])
    write(tmp_path, {"a/1.png": encoded(pixels)})
    shown = load_images("folder", tmp_path, background).pixels[0, 0].double()
    alpha = torch.tensor([1, 128 / 255, 0], dtype=torch.float64)[:, None]
    expected = alpha * torch.tensor([200, 100, 0]) + (1 - alpha) * torch.tensor(behind)
    assert (shown - expected).abs().max() <= 0.51


def test_transparent_grey(tmp_path):
    """One channel; a coloured background counts with its brightness, 0.299 R + 0.587 G + 0.114 B."""
    pixels = np.array([[[40, 255], [40, 0]]])
    write(tmp_path, {"a/1.png": encoded(pixels)})
    assert load_images("folder", tmp_path).pixels.flatten().tolist() == [40, 255]
    assert load_images("folder", tmp_path, "#ff8000").pixels.flatten().tolist() == [40, 151]


def test_transparent_palettes_and_key_colours(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    key = encoded(np.array([[[1, 2, 3], [4, 5, 6]]]), transparency=(4, 5, 6))
    write(tmp_path, {"a/1.png": buffer.getvalue(), "a/2.png": key})
    expected = [[[10, 20, 30], [255, 255, 255]], [[1, 2, 3], [255, 255, 255]]]
    assert load_images("folder", tmp_path).pixels[:, 0].tolist() == expected


def test_opaque_pictures_do_not_depend_on_the_background(tmp_path):
    write(tmp_path, {"a/1.png": encoded(COLOURS)})
    assert load_images("folder", tmp_path).source == load_images("folder", tmp_path, "black").source


def test_several_pictures_in_a_file_are_refused(tmp_path):
    first, second = (Image.new("L", (4, 4), value) for value in (1, 2))
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=[second])
    write(tmp_path, {"a/1.tif": buffer.getvalue()})
    with pytest.raises(ValueError, match=r"a/1.tif: .*2 pictures in one file, expected one"):
        load_images("folder", tmp_path)


def test_classes_are_in_natural_order(tmp_path):
    write(tmp_path, {f"{number}/x.png": grey(number) for number in range(12)})
    images = load_images("folder", tmp_path)
    assert images.classes == tuple(map(str, range(12)))
    assert images.labels.tolist() == values(images)


def test_classes_without_pictures_keep_their_numbers(tmp_path):
    """`b` is empty, `c` has a suffix that is not read."""
    write(tmp_path, {"a/1.TIF": encoded(np.zeros((4, 4)), "TIFF"), "c/1.gif": b"GIF", "d/1.png": grey(3, (4, 4))})
    write(tmp_path, {"notes.txt": b"words", "d/.DS_Store": b"", "__MACOSX/d/1.png": b"", "d/._1.png": b""})
    (tmp_path / "b").mkdir()
    images = load_images("folder", tmp_path)
    assert images.classes == ("a", "b", "c", "d")
    assert images.labels.tolist() == [0, 3]
    assert images.notes == (
        f"{tmp_path}: not read: 1 .gif, 1 .txt, 3 hidden",
        f"{tmp_path}: no pictures in b, c; other classes keep their numbers",
    )


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Train", "valid", "Test"), ("training", "validation", "testing")],
)
def test_a_split_of_folders(tmp_path, train, val, test):
    write(
        tmp_path,
        {
            f"{test}/cat/1.png": grey(4),
            f"{val}/dog/1.png": grey(3),
            f"{train}/dog/2.png": grey(2),
            f"{train}/cat/9.png": grey(1),
        },
    )
    images = load_images("folder", tmp_path)
    assert values(images) == [1, 2, 3, 4]
    assert images.labels.tolist() == [0, 1, 1, 0]
    assert images.classes == ("cat", "dog")
    assert images.validation.tolist() == [False, False, True, False]
    assert images.held_out.tolist() == [False, False, False, True]
    assert images.keeps_split
    assert images.notes == (
        f"{tmp_path}: found the folders of a split, train (2 pictures), val (1 picture), test (1 picture); networks "
        "are split as their pictures are",
    )


def test_classes_without_training_pictures_are_said(tmp_path):
    write(tmp_path, {"train/cat/1.png": grey(1), "train/dog/1.png": grey(2), "test/cats/1.png": grey(3)})
    images = load_images("folder", tmp_path)
    assert images.classes == ("cat", "cats", "dog")
    assert images.notes[1] == f"{tmp_path}: no training picture of cats; check the names of the classes' folders"


def test_a_split_without_classes(tmp_path):
    images = load_images("folder", write(tmp_path, {"train/1.png": grey(1), "val/1.png": grey(2)}))
    assert (images.labels.tolist(), images.classes, images.held_out) == ([0, 0], None, None)
    assert images.validation.tolist() == [False, True]


def test_pictures_outside_of_a_split_are_refused(tmp_path):
    write(tmp_path, {"train/a/1.png": grey(1), "test/a/1.png": grey(2), "extra/a/1.png": grey(3)})
    with pytest.raises(
        ValueError, match=r"found folders train and test of a split, and extra/a/1.png in no class of one of them"
    ):
        load_images("folder", tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a/1", "train/b/2", "test/3"), "found folders train of a split, and test/3.png in no class"),
        (("train/a/1", "dev/a/2"), "found folders train of a split, and dev/a/2.png in no class"),
        (("train/a/1", "test/a/2", "cover"), "train and test of a split, and cover.png in no class of one of them"),
        (("val/a/1", "test/a/2"), "found folders val and test of a split, and none for training"),
        (("cover", "a/1"), r"cover.png is in no class's folder \(1 in all\), but a/1.png is"),
    ],
)
def test_halves_of_splits_are_refused(tmp_path, names, message):
    """Neither classes nor pictures of a split are made up."""
    with pytest.raises(ValueError, match=message):
        load_images("folder", write(tmp_path, {f"{name}.png": grey(1) for name in names}))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("seg_train/seg_train/{}", "seg_test/seg_test/{}"),
        ("training_set/{}", "test_set/{}"),
        ("pets/Train/{}", "pets/Test/{}"),
        ("train2024/{}", "test2024/{}"),
        ("{}/train", "{}/test"),
        ("pets/{}/training", "pets/{}/testing"),
    ],
)
def test_forms_of_splits(tmp_path, train, test):
    """Around the folders of classes and in them, in the words of others."""
    places = [train.format("cat"), train.format("dog"), test.format("dog"), test.format("cat")]
    images = load_images("folder", write(tmp_path, {f"{place}/1.png": grey(k) for k, place in enumerate(places)}))
    assert images.classes == ("cat", "dog")
    found = zip(values(images), images.labels.tolist(), images.held_out.tolist(), strict=True)
    assert sorted(found) == [(0, 0, False), (1, 1, False), (2, 1, True), (3, 0, True)]


def test_words_of_splits_in_names_of_classes(tmp_path):
    """A class may be called so, alone, beside others, or in a split."""
    images = load_images("folder", write(tmp_path / "a", {"test_tube/1.png": grey(1), "train_car/1.png": grey(2)}))
    assert (images.classes, images.held_out) == (("test_tube", "train_car"), None)
    names = ("train/train/1", "train/test/1", "test/train/1", "test/test/1")
    images = load_images("folder", write(tmp_path / "b", {f"{name}.png": grey(1) for name in names}))
    assert (images.classes, images.held_out.tolist()) == (("test", "train"), [False, False, True, True])
    images = load_images("folder", write(tmp_path / "c", {f"{name}/1.png": grey(1) for name in ("train", "test", "x")}))
    assert images.classes == ("test", "train", "x")
    assert images.notes == (f"{tmp_path / 'c'}: test, train are taken as classes, since other folders are beside them",)


def test_folders_of_a_split_without_pictures_are_said(tmp_path):
    write(tmp_path, {"train/cat/1.png": grey(1), "train/dog/1.png": grey(2), "test/cat/1.gif": b"GIF"})
    images = load_images("folder", tmp_path)
    assert (images.classes, images.held_out) == (("cat", "dog"), None)
    assert images.notes == (
        f"{tmp_path}: not read: 1 .gif",
        f"{tmp_path}: no pictures in test; what a split lacks is drawn from the others",
    )


def test_accents_are_one_letter_or_two(tmp_path):
    images = load_images("folder", write(tmp_path, {"caf\u00e9/1.png": grey(1), "cafe\u0301/2.png": grey(2)}))
    assert (images.classes, images.labels.tolist()) == (("caf\u00e9",), [0, 0])


def test_many_kinds_of_other_files(tmp_path):
    write(tmp_path, {f"a/{k}.png": grey(k) for k in range(2)} | {f"a/scan.{k}": b"" for k in range(12)} | {"a/9": b""})
    (note,) = load_images("folder", tmp_path).notes
    assert note == f"{tmp_path}: not read: 1 .0, 1 .1, 1 .10, 1 .11, 1 .2, 1 .3, 1 .4, 1 .5 and 5 of other kinds"


def test_folders_of_classes_in_several_places_are_said(tmp_path):
    """They are taken together; those side by side are not worth a word."""
    write(tmp_path, {"one/a/1.png": grey(1), "two/a/1.png": grey(2), "two/a/b/1.png": grey(3)})
    images = load_images("folder", tmp_path)
    assert (images.classes, images.labels.tolist()) == (("a", "b"), [0, 0, 1])
    assert images.notes == (
        f"{tmp_path}: a picture's class is the folder that it is in, and these are in several: one/a, two/a, two/a/b",
    )
    assert load_images("folder", tmp_path / "one").notes == ()


def test_what_is_no_picture(tmp_path):
    """Nothing of the reader's own objects."""
    with pytest.raises(ValueError, match=r"^a/1.png: not a readable image \(no picture, or a damaged one\); replace"):
        load_images("folder", write(tmp_path, {"a/1.png": b"text"}))


def test_classes_may_have_the_names_of_splits(tmp_path):
    images = load_images("folder", write(tmp_path, {"train/1.png": grey(1), "car/1.png": grey(2)}))
    assert (images.classes, images.labels.tolist(), images.keeps_split) == (("car", "train"), [0, 1], False)


def split_folder(tmp_path, **sizes):
    """Pictures in two classes of each split; the first value of a picture is its split's number, and its own."""
    files = {
        f"{split}/{name}/{k}.png": grey(10 * number + k)
        for number, (split, size) in enumerate(sizes.items(), start=1)
        for name in ("left", "right")
        for k in range(size)
    }
    return write(tmp_path / "pictures", files)


def inr_recipe(tmp_path, folder, **changes):
    recipe = InrRecipe(out=str(tmp_path / "zoo"), images="folder", images_path=str(folder), hidden=(4,), steps=1)
    return replace(recipe, views=2, **changes)


def shown_in(zoo, images, split):
    return sorted(images.pixels[zoo.columns["image"][zoo.splits[split]], 0, 0, 0].tolist())


@pytest.mark.parametrize("fraction", [0.2, None])
def test_networks_are_split_as_their_pictures(tmp_path, fraction, capsys):
    """Whatever share testing has: no picture of another split comes into it."""
    folder = split_folder(tmp_path, train=3, valid=2, test=1)
    zoo = open_zoo(make_zoo(inr_recipe(tmp_path, folder, test_fraction=fraction)))
    images = load_images("folder", folder)
    assert shown_in(zoo, images, "train") == [10, 10, 10, 10, 11, 11, 11, 11, 12, 12, 12, 12]
    assert shown_in(zoo, images, "val") == [20, 20, 20, 20, 21, 21, 21, 21]
    assert shown_in(zoo, images, "test") == [30, 30, 30, 30]
    assert zoo.classes == ("left", "right")
    assert (
        "found the folders of a split, train (6 pictures), val (4 pictures), test (2 pictures)"
        in capsys.readouterr().err
    )


def test_what_a_split_lacks_is_drawn_from_its_training_pictures(tmp_path):
    folder = split_folder(tmp_path, train=5, test=2)
    zoo = open_zoo(make_zoo(inr_recipe(tmp_path, folder)))
    images = load_images("folder", folder)
    assert shown_in(zoo, images, "test") == [20, 20, 20, 20, 21, 21, 21, 21]
    assert len(shown_in(zoo, images, "val")) == 2
    assert max(shown_in(zoo, images, "val") + shown_in(zoo, images, "train")) < 20


def test_cnns_are_trained_and_tested_on_the_split(tmp_path):
    """Pictures that test show the class, those that train and those that validate the opposite."""
    files = {}
    for split, swapped in (("train", 0), ("val", 0), ("test", 1)):
        for k in range(8):
            files[f"{split}/{'ab'[swapped]}/{k}.png"] = grey(k)
            files[f"{split}/{'ba'[swapped]}/{k}.png"] = grey(255 - k)
    recipe = CnnRecipe(
        out=str(tmp_path / "zoo"),
        images="folder",
        images_path=str(write(tmp_path / "pictures", files)),
        networks=8,
        checkpoints=(60,),
        channels=(4,),
        padding="same",
        train_fractions=(1.0,),
        optimizers=("adam",),
        lr=(1e-2, 2e-2),
        dropout=(0.0, 0.01),
        init_std=(0.3, 0.5),
    )
    zoo = open_zoo(make_cnn_zoo(recipe))
    assert zoo.columns["train_accuracy"].median() == 1
    assert zoo.columns["test_accuracy"].median() == 0


def test_editing_finds_the_pictures_with_their_background(tmp_path):
    pixels = np.zeros((8, 8, 2), np.uint8)
    pixels[:4] = 255
    write(tmp_path / "pictures", {f"a/{k}.png": encoded(pixels) for k in range(10)})
    zoo = open_zoo(make_zoo(inr_recipe(tmp_path, tmp_path / "pictures", background="#404040")))
    assert zoo.provenance["background"] == "#404040"
    images = original_images(zoo, DataConfig(images_path=str(tmp_path / "pictures")))
    assert images.pixels[0, :, 0, 0].tolist() == [255] * 4 + [64] * 4


def test_unknown_colours_are_refused():
    with pytest.raises(ValueError, match="background: found whiet, expected a colour such as white, black or #ff8000"):
        InrRecipe(background="whiet")
