"""Makes README's figures from the page of a run that classifies SIRENs: `python docs/figures/make.py RUN`.

Needs Chromium (Debian: `apt-get install chromium`) and the extra `dev`.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from scalegmn.cli import explore

FOLDER = Path(__file__).parent
COLOURS = 48
FRAMES = 12
MILLISECONDS = 550


def shot(page: Page, selector: str, height: int) -> Image.Image:
    """The upper part of an element, at most so high."""
    image = Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")
    return image.crop((0, 0, image.width, min(image.height, height)))


def stacked(images: list[Image.Image]) -> Image.Image:
    """Images below one another."""
    width, gap = max(image.width for image in images), 10
    whole = Image.new("RGB", (width, sum(image.height + gap for image in images) - gap), (244, 245, 247))
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height + gap
    return whole


def main(run: str) -> None:
    """Writes page.png and playground.gif beside this file."""
    file = FOLDER / "page.html"
    explore.run([run, "--out", str(file)])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        stacked([shot(page, "#map-section", 600), shot(page, "#network", 700)]).quantize(128).save(
            FOLDER / "page.png", optimize=True
        )
        page.set_viewport_size({"width": 800, "height": 900})
        page.wait_for_timeout(300)
        frames = []
        page.add_style_tag(
            content="#heat, #layers, #network > h2, #network > .bar, #playground .note { display: none }"
        )
        for _ in range(FRAMES + 1):
            frames.append(shot(page, "#network", 900))
            page.focus("#walk")
            for _press in range(2):
                page.keyboard.press("ArrowRight")
        browser.close()
    file.unlink()
    palette = stacked(frames[:: FRAMES // 2]).quantize(COLOURS, dither=Image.Dither.NONE)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options = {"save_all": True, "append_images": small[1:], "duration": MILLISECONDS, "loop": 0, "optimize": True}
    small[0].save(FOLDER / "playground.gif", **options)


if __name__ == "__main__":
    main(sys.argv[1])
