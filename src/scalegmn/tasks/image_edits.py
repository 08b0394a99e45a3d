"""Edits of images, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numpy.typing import NDArray

from scalegmn.registry import Registry
from scalegmn.tasks.contrast import equalize_lightness


@dataclass(frozen=True)
class ImageEdit:
    """An edit of images.

    Args:
        name: what configurations call it (`data.style_function`).
        function: images [n, height, width, channels] in [0, 1] -> the edited images, of the same shape.
        num_channels: the channels of the images that it is for.
        description: what it does, in one line, for `--help`.
    """

    name: str
    function: Callable[[NDArray], NDArray]
    num_channels: int
    description: str

    def __call__(self, images: NDArray) -> NDArray:
        """The edited images, [n, height, width, channels]."""
        return self.function(images)


IMAGE_EDITS: Registry[ImageEdit] = Registry("image edit")
"""Name -> edit."""


def register_image_edit(edit: ImageEdit) -> ImageEdit:
    """Makes an edit usable by its name; raises ValueError when another edit has it."""
    return IMAGE_EDITS.register(edit.name, edit)


def dilate(images: NDArray) -> NDArray:
    """The maximum over 3x3 pixels of each image, [n, height, width, 1]: thicker strokes."""
    from scipy.ndimage import grey_dilation  # takes long to import

    return grey_dilation(images, size=(1, 3, 3, 1))


register_image_edit(ImageEdit("dilate", dilate, 1, "thicker strokes: the maximum over 3x3 pixels"))
register_image_edit(
    ImageEdit("increase_contrast", equalize_lightness, 3, "contrast-limited adaptive equalisation of the lightness")
)
