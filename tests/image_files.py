"""Files of images, byte by byte."""

import io
import struct

import numpy as np
from PIL import Image


def idx(values):
    """An IDX file of bytes."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def encoded(values, kind="PNG", **options):
    """A picture of bytes [height, width] or [height, width, channels]."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder, files):
    """Files by their names below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
