"""Pictures of a page's drawings, shrunk until only gross breakage shows; `python tests/screens.py` stores them anew."""

import io
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from scalegmn.explore.content import Collection
from scalegmn.explore.page import page
from scalegmn.networks import NetSpec
from scalegmn.networks.siren import init_siren
from scalegmn.zoos.zoo_format import Networks

STORED = Path(__file__).parent / "explore" / "screens.png"
SIDE = 32
DRAWINGS = ("#map", "#histograms", "#graph", "#heat figure:nth-child(2) canvas")
WINDOWS = ((1280, "light"), (1280, "dark"), (400, "light"))


def drawn_page():
    """A page of 300 networks, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    params = init_siren(NetSpec.mlp([2, 12, 12, 1], "sine", w0=6.0), 300, generator)
    label = torch.arange(300) % 3
    x = torch.randn(300, generator=generator) + 4 * label
    y = torch.randn(300, generator=generator) + 3 * (label == 1)
    columns = {"label": [f"class {number}" for number in label.tolist()], "psnr": x.tolist()}
    names = [str(number) for number in range(300)]
    features = torch.stack([x, x, y], 1)
    nets = Networks((params,), {})
    return page([Collection("zoo", "zoo", "drawn", names, nets, columns, (8, 8, 1), 0.5, features, "features")])


def shrunk(opened):
    """The luminance of each drawing in `SIDE` x `SIDE` blocks, below one another."""
    shots = [Image.open(io.BytesIO(opened.locator(drawing).screenshot())) for drawing in DRAWINGS]
    small = [shot.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for shot in shots]
    return np.concatenate([np.asarray(image, dtype=float) / 255 for image in small])


def unlike(found, stored):
    """The drawings that differ grossly: a correlation of blocks below 0.85, or a mean difference above 0.08."""
    result = []
    for number, drawing in enumerate(DRAWINGS):
        a, b = (image[number * SIDE : (number + 1) * SIDE] for image in (found, stored))
        centred = a - a.mean(), b - b.mean()
        norms = [np.sqrt((c**2).sum()) for c in centred]
        correlation = (centred[0] * centred[1]).sum() / max(norms[0] * norms[1], 1e-9)
        if correlation < 0.85 or np.abs(a - b).mean() > 0.08:
            result.append(drawing)
    return result


def stored(window):
    """The stored picture of a window."""
    image = np.asarray(Image.open(STORED), dtype=float) / 255
    column = WINDOWS.index(window)
    return image[:, column * SIDE : (column + 1) * SIDE]


def open_in(browser, path, window):
    """The page in a window of this width and colour scheme."""
    width, scheme = window
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(path.as_uri())
    opened.wait_for_selector("html[data-ready=yes]", state="attached")
    return opened


def main():
    """Stores what Chromium draws now."""
    from playwright.sync_api import sync_playwright

    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        path.write_text(drawn_page())
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        columns = [shrunk(open_in(browser, path, window)) for window in WINDOWS]
        Image.fromarray((255 * np.concatenate(columns, 1)).round().astype(np.uint8)).save(STORED, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
