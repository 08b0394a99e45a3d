from pathlib import Path

import numpy as np
import pytest

from scalegmn.tasks.contrast import clahe, equalize_lightness
from scalegmn.tasks.image_edits import IMAGE_EDITS, dilate

CLAHE = np.load(Path(__file__).parents[1] / "fixtures" / "clahe.npz")
"""Two images, and what OpenCV 5.0 makes of them: lightness, `createCLAHE(1.0, (3, 3))` of it, the edited image."""


def test_dilation():
    image = np.zeros((1, 5, 5, 1))
    image[0, 1, 1], image[0, 4, 4] = 0.5, 1.0
    expected = np.zeros((5, 5))
    expected[:3, :3], expected[3:, 3:] = 0.5, 1.0
    assert np.array_equal(dilate(image)[0, ..., 0], expected)


def test_each_image_on_its_own():
    rng = np.random.default_rng(0)
    for edit in IMAGE_EDITS.values():
        images = rng.random((3, 9, 12, edit.num_channels))
        one_by_one = np.concatenate([edit(image[None]) for image in images])
        assert np.array_equal(edit(images), one_by_one)
        assert not np.allclose(images, one_by_one)
        assert one_by_one.min() >= 0
        assert one_by_one.max() <= 1


def test_equalisation_is_opencvs():
    difference = np.abs(clahe(CLAHE["lightness"]) - CLAHE["equalised"])
    assert difference.max() <= 1  # where rounding decides
    assert (difference > 0).mean() < 0.01


def test_contrast_is_higher_and_nearly_opencvs():
    images = CLAHE["images"] / 255
    found = equalize_lightness(images)
    assert np.abs(found - CLAHE["edited"] / 255).mean() < 0.012  # OpenCV rounds the colours to 8 bits
    assert found.std() > images.std()


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_grey_stays_grey(value):
    image = equalize_lightness(np.full((1, 32, 32, 3), value))
    assert np.ptp(image, axis=-1).max() < 1e-3
