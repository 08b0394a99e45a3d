"""The page in a real browser, with real events: opened from the disk, without a network.

Needs Debian's `chromium`. Without one the tests are skipped, unless SCALEGMN_BROWSER=required, as .ci/run sets it
where it has installed one.
"""

import base64
import json
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from screens import DRAWINGS, WINDOWS, drawn_page, open_in, shrunk, stored, unlike

from scalegmn.experiments.report import find_runs
from scalegmn.experiments.report import page as report
from scalegmn.explore.content import collections_of, of_zoo
from scalegmn.explore.featured import Move
from scalegmn.explore.page import page
from scalegmn.interop.network_files import InputOptions
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.evaluate import evaluate
from scalegmn.networks.siren import pixel_grid, render
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "'\"><svg onload=window.hacked=1>",
]


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        assert os.environ.get("SCALEGMN_BROWSER") != "required", "chromium is missing: apt-get install chromium"
        pytest.skip("no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(digits, shown_run, tmp_path_factory):
    """`digits.html`: a run and its zoo; `hostile.html`: a zoo whose every name is markup."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "digits.html").write_text(page([shown_run, of_zoo(digits.zoo)]))
    params = open_zoo(digits.zoo).params[:12]
    columns = {"label": torch.arange(12) % 3, HOSTILE[1]: torch.rand(12)}
    parts = [Networks((params,), columns)]
    splits = {"train": torch.arange(6), "val": torch.arange(6, 9), "test": torch.arange(9, 12)}
    write_zoo(folder / "zoo", parts, splits, {"classes": HOSTILE, "image_shape": [8, 8, 1]})
    hostile = replace(of_zoo(folder / "zoo"), name=HOSTILE[0], note=HOSTILE[1], facts=[HOSTILE[2]])
    hostile.names = [HOSTILE[number % 3] for number in range(12)]
    (folder / "hostile.html").write_text(page([hostile, replace(hostile, name=HOSTILE[2])]))
    return folder, shown_run


class Watched:
    """A page that was opened from the disk, and what it said and asked for."""

    def __init__(self, browser, path, width=1280, dark=False):
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page, self.messages, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if "report" not in path.name:
            self.page.wait_for_selector("html[data-ready=yes]", state="attached")

    def __getattr__(self, name):
        return getattr(self.page, name)

    def text(self, selector):
        return self.page.inner_text(selector)

    def drag(self, selector, points):
        """Presses the button at the first point, moves over the others, releases it; shares of the element's box."""
        self.page.locator(selector).scroll_into_view_if_needed()
        box = self.page.locator(selector).bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=3)
        self.page.mouse.up()

    def slide(self, selector, key, count):
        """Presses an arrow key on a slider."""
        self.page.focus(selector)
        for _ in range(count):
            self.page.keyboard.press(key)

    def close(self):
        """Ends it; nothing was said, and nothing but the file was asked for."""
        assert self.messages == []
        assert all(url.startswith(("file://", "data:")) for url in self.requests), self.requests
        assert len([url for url in self.requests if url.startswith("file://")]) == 1
        self.context.close()


@pytest.fixture
def digits_page(browser, pages):
    watched = Watched(browser, pages[0] / "digits.html")
    yield watched
    watched.close()


def test_hover_shows_what_a_network_draws(digits_page):
    place = digits_page.evaluate("places[30]")
    box = digits_page.locator("#map").bounding_box()
    digits_page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    row = digits_page.evaluate("state.hover")
    assert row is not None
    assert digits_page.text("#card strong") == f"network {digits_page.evaluate('state.collection.names[state.hover]')}"
    assert "psnr" in digits_page.text("#card")
    pixels = digits_page.evaluate(
        "Array.from(document.querySelector('#card canvas').getContext('2d').getImageData(0, 0, 8, 8).data)"
    )
    expected = digits_page.evaluate(
        "Array.from(state.collection.pixels.slice(state.hover * 64, state.hover * 64 + 64))"
    )
    assert pixels[::4] == expected
    digits_page.mouse.click(box["x"] + place[0], box["y"] + place[1])
    assert digits_page.evaluate("state.row") == row


def test_lasso_sort_and_filter(digits_page):
    total = digits_page.evaluate("state.collection.names.length")
    digits_page.drag("#map", [(0.01, 0.01), (0.99, 0.01), (0.99, 0.5), (0.01, 0.5), (0.01, 0.02)])
    chosen = digits_page.evaluate("[...state.selected]")
    height = digits_page.evaluate("map.clientHeight")
    places = digits_page.evaluate("places")
    assert sorted(chosen) == [row for row, (_, y) in enumerate(places) if y < height / 2]
    assert digits_page.text("#count") == f"{len(chosen)} networks"
    digits_page.click("#table thead button:text-is('psnr')")
    column = digits_page.evaluate("1 + state.collection.columns.findIndex(column => column.name === 'psnr')")
    cells = f"[...document.querySelectorAll('#table tbody tr')].map(row => +row.cells[{column}].textContent)"
    shown = digits_page.evaluate(cells)
    assert shown == sorted(shown)
    digits_page.click("#table thead button:text-is('psnr')")
    assert digits_page.evaluate(cells) == sorted(shown, reverse=True)
    assert digits_page.get_attribute("#table th[aria-sort]", "aria-sort") == "descending"
    digits_page.fill("#filter", "psnr > 40")
    assert all(value > 40 for value in digits_page.evaluate(cells))
    digits_page.fill("#filter", "")
    digits_page.click("#clear")
    assert digits_page.text("#count") == f"{total} networks"


def test_the_keyboard_reaches_the_map_and_the_neurons(digits_page):
    digits_page.focus("#map")
    for _ in range(3):
        digits_page.keyboard.press("ArrowRight")
    row = digits_page.evaluate("state.hover")
    digits_page.keyboard.press("Enter")
    assert digits_page.evaluate("state.row") == row
    digits_page.focus(".neuron:not(.fixed) >> nth=5")
    digits_page.keyboard.press("Enter")
    assert digits_page.evaluate("+byId('move-neuron').value") == 5


def weights_of(watched):
    flat = watched.evaluate("state.moved.weights.map((w, l) => [...w, ...state.moved.biases[l]]).flat()")
    return torch.tensor(flat, dtype=torch.float64)


def test_every_control_of_the_playground_agrees_with_python(digits_page, pages):
    """Moved parameters and drawn images at 1e-5; the image does not change, and neither does the model's answer."""
    run = pages[1]
    row = digits_page.evaluate("state.row")
    params = run.nets.take(torch.tensor([row])).to(torch.float64)
    entry = next(entry for entry in run.featured if entry["row"] == row)
    before = digits_page.text("#moved")
    assert "trained model" in before
    # the function that the page computes
    drawn = digits_page.evaluate("Array.from(rendered(state.params, 8, 8))")
    assert np.abs(drawn - render(params, 8, 8).flatten().numpy()).max() < 1e-5
    points = [[0.3, -0.7], [0.1, 0.9]]
    values = digits_page.evaluate(f"Array.from(evaluate(state.architecture, state.params, {points}))")
    assert np.abs(values - evaluate(params, torch.tensor(points).double()).flatten().numpy()).max() < 1e-5
    assert pixel_grid(8, 8).numpy() == pytest.approx(np.array(digits_page.evaluate("grid(8, 8)")), abs=1e-6)

    def check(moves, answer):
        moved = params
        for move in moves:
            moved = move.act(moved)
        assert (weights_of(digits_page) - moved.flatten()[0]).abs().max() < 1e-5
        assert moves == [] or (moved.flatten() - params.flatten()).abs().max() > 1e-3
        lines = digits_page.evaluate(
            "[...document.querySelectorAll('#moved div')].map(line => line.innerText.split('\\n'))"
        )
        assert float(dict(lines)["largest change of a pixel"]) < 1e-5
        if answer:
            assert dict(lines)["trained model"] == f"{answer[0]} ({100 * answer[1]:.1f} %)"
            assert dict(lines)["MLP of all weights"] == f"{answer[2]} ({100 * answer[3]:.1f} %)"
        return lines

    digits_page.select_option("#move-layer", "1")
    digits_page.select_option("#move-neuron", "2")
    digits_page.slide("#phase", "ArrowRight", 3)
    check([Move("phase", 1, 2, 3)], entry["moves"]["phase:1:2:3"])
    digits_page.click("#reset")
    check([], entry["moves"][""])
    digits_page.select_option("#move-neuron", "4")
    digits_page.click("#flip")
    check([Move("flip", 1, 4)], entry["moves"]["flip:1:4"])
    digits_page.select_option("#move-other", "6")
    digits_page.click("#swap")
    lines = check([Move("flip", 1, 4), Move("swap", 1, 4, 6)], None)
    assert dict(lines)["trained model"].startswith("computed for")
    digits_page.slide("#walk", "ArrowRight", 7)
    walk = [
        Move(kind, int(layer), int(neuron), *map(float, rest))
        for kind, layer, neuron, *rest in (key.split(":") for key in entry["walk"][:7])
    ]
    check(walk, entry["walk_answers"][7])
    digits_page.click("#reset")
    assert digits_page.text("#moved") == before


def test_collections_colours_and_more_rows(digits_page):
    assert digits_page.is_visible("#explanation svg")
    digits_page.click("#collections button:nth-child(2)")
    assert not digits_page.is_visible("#explanation")
    before = digits_page.locator("#map").screenshot()
    digits_page.select_option("#colour", "psnr")
    assert digits_page.locator("#map").screenshot() != before
    rows = digits_page.locator("#table tbody tr").count()
    digits_page.click("#more")
    assert digits_page.locator("#table tbody tr").count() > rows == 100


def test_scale_slider_and_cnns(browser, tmp_path, random_params, cnn_spec):
    """Relu channels of a CNN: scaled as in Python."""
    params = random_params(cnn_spec, 12).map(torch.Tensor.float)
    splits = {"train": torch.arange(6), "val": torch.arange(6, 9), "test": torch.arange(9, 12)}
    write_zoo(tmp_path / "zoo", [Networks((params,), {"test_accuracy": torch.rand(12)})], splits, {})
    (tmp_path / "cnn.html").write_text(page([of_zoo(tmp_path / "zoo")]))
    watched = Watched(browser, tmp_path / "cnn.html")
    watched.select_option("#move-layer", "1")
    watched.slide("#scale", "ArrowRight", 5)
    q = watched.evaluate("Number((10 ** .5).toPrecision(3))")
    expected = Move("scale", 1, 0, q).act(params[:1].to(torch.float64)).flatten()[0]
    assert (weights_of(watched) - expected).abs().max() < 1e-5
    watched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A page of classifiers in state dicts, of 1, 2 and 20 inputs, the last one large; their parameters by name."""
    folder, nets = tmp_path_factory.mktemp("files"), {}
    generator = torch.Generator().manual_seed(0)
    for name, widths in (("line", [1, 8, 3]), ("plane", [2, 9, 4]), ("wide", [20, 400, 300, 5])):
        params = NetSpec.mlp(widths, "tanh")
        tensors = {}
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            tensors[f"{number}.weight"] = 2 * torch.randn(outputs, inputs, generator=generator) / inputs**0.5
            tensors[f"{number}.bias"] = torch.randn(outputs, generator=generator)
        torch.save(tensors, folder / f"{name}.pth")
        tensors = list(tensors.values())
        nets[name] = NetParams(
            params, tuple(weight[None] for weight in tensors[::2]), tuple(bias[None] for bias in tensors[1::2])
        )
    (folder / "page.html").write_text(page(collections_of([str(folder)], InputOptions("tanh", 30.0))))
    return folder / "page.html", nets


def test_what_classifiers_compute(browser, files):
    """Decision curves and shares of classes are those of Python."""
    path, nets = files
    watched = Watched(browser, path)
    names = watched.evaluate("state.collection.names.map(name => name.split('/').pop().split('.')[0])")
    assert set(names) == set(nets)
    watched.select_option("#pick", str(names.index("plane")))
    grid = torch.linspace(-3, 3, 72)
    points = torch.stack([grid.repeat(72), grid.flip(0).repeat_interleave(72)], 1)
    expected = evaluate(nets["plane"], points)[0].argmax(1).reshape(72, 72)
    colours = [[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour in watched.evaluate("CATEGORIES")]
    data = "Array.from(document.querySelector('#pictures canvas').getContext('2d').getImageData(0, 0, 72, 72).data)"
    pixels = np.array(watched.evaluate(data)).reshape(72, 72, 4)[..., :3]
    edge = (pixels == 0).all(2)
    assert 0 < edge.mean() < 0.2
    tints = 255 - np.array(colours[:4])  # a pixel is white less a share of its class's tint
    drawn = 255 - pixels
    share = (drawn[:, :, None] * tints).sum(-1) / (tints**2).sum(-1)
    shown = np.abs(drawn[:, :, None] - share[..., None] * tints).sum(-1).argmin(2)
    assert (shown == expected.numpy())[~edge].all()
    assert len(np.unique(shown[~edge])) > 1
    watched.click("#swap")
    assert float(watched.text("#moved div:nth-child(2) strong")) < 1e-5
    watched.select_option("#pick", str(names.index("line")))
    assert watched.locator("#pictures svg path").count() == 3
    watched.select_option("#pick", str(names.index("wide")))
    generator = torch.Generator().manual_seed(0)
    answers = evaluate(nets["wide"], torch.randn(10, 20, generator=generator))[0].softmax(1)
    captions = watched.evaluate("[...document.querySelectorAll('#answers figcaption')].map(c => c.innerText)")
    best, number = answers.max(1)
    for caption, share, label in zip(captions, best.tolist(), number.tolist(), strict=True):
        title, answer = caption.split("\n")
        assert title.startswith("input ")
        assert answer.startswith(f"{label}: ")
        assert float(answer.split()[1]) == pytest.approx(100 * share, abs=0.8)
    assert "summarised" in watched.text("#graph-key")
    assert watched.locator("#graph .neuron").count() == 20 + 20 + 20 + 5
    watched.close()


def test_contributions_move_with_the_neurons(digits_page, pages):
    run = pages[1]
    entry = next(entry for entry in run.featured if entry["row"] == digits_page.evaluate("state.row"))
    values = torch.from_numpy(np.frombuffer(base64.b64decode(entry["explanation"]["values"]), np.float32).copy())
    shares = run.nets.take(torch.tensor([0])).unflatten(values[None])
    weights = digits_page.inner_html("#graph")
    digits_page.select_option("#paint", "contributions")
    assert digits_page.inner_html("#graph") != weights
    flat = "(() => { const p = painted(); return p.weights.map((w, l) => [...w, ...p.biases[l]]).flat() })()"
    assert torch.tensor(digits_page.evaluate(flat)) == pytest.approx(values, abs=1e-6)
    digits_page.click("#flip")
    digits_page.select_option("#move-other", "3")
    digits_page.click("#swap")
    expected = Move("swap", 0, 0, 3).act(shares).flatten()[0]
    assert torch.tensor(digits_page.evaluate(flat)) == pytest.approx(expected, abs=1e-6)
    assert (expected - values).abs().max() > 1e-4


def test_architectures(browser, tmp_path, random_params):
    """Several architectures have diagrams that select their networks; tied and pinned neurons have their shapes."""
    layers = (LayerSpec(2, 4, None, "relu"), LayerSpec(4, 4, None, "relu", residual=0), LayerSpec(4, 1))
    pinned = (LayerSpec(2, 3, None, "relu", pinned=True), LayerSpec(3, 1))
    parts = [random_params(NetSpec(each), 6).map(torch.Tensor.float) for each in (layers, pinned)]
    splits = {"train": torch.arange(6), "val": torch.arange(6, 9), "test": torch.arange(9, 12)}
    write_zoo(tmp_path / "zoo", [Networks((part,), {"psnr": torch.rand(6)}) for part in parts], splits, {})
    (tmp_path / "page.html").write_text(page([of_zoo(tmp_path / "zoo")]))
    watched = Watched(browser, tmp_path / "page.html")
    assert watched.locator("#architectures button").count() == 2
    watched.click("#architectures button:nth-child(2)")
    rows = watched.evaluate("[...state.selected]")
    assert len({watched.evaluate(f"state.collection.architecture[{row}]") for row in rows}) == 1
    assert len(rows) == 6
    assert watched.locator("#histograms figure").count() == watched.evaluate("state.collection.columns.length")
    shapes = {}
    for row in ("0", "6"):
        watched.select_option("#pick", row)
        shapes[watched.locator("#graph rect.tied").count()] = watched.locator("#graph path.pinned").count()
        assert watched.locator("#graph path.skip").count() == (1 if watched.locator("#graph rect.tied").count() else 0)
    assert shapes == {8: 0, 0: 3}
    watched.close()


AUDIT = Path(__file__).with_name("audit.js").read_text()
"""What keeps people out: drawings and controls without names, words that are hard to read."""


@pytest.mark.parametrize("dark", [False, True])
def test_everybody_can_read_it(browser, pages, files, dark):
    """Drawings and controls have names, and all words a contrast of 4.5 to their background; a control shows that the
    audit finds what is missing."""
    for path in (pages[0] / "digits.html", files[0]):
        watched = Watched(browser, path, dark=dark)
        for number in range(watched.locator("#collections button").count() or 1):
            if number:
                watched.click(f"#collections button:nth-child({number + 1})")
            assert watched.evaluate(AUDIT) == []
            watched.drag("#map", [(0.01, 0.01), (0.99, 0.01), (0.99, 0.9), (0.01, 0.9), (0.01, 0.02)])
            assert watched.evaluate(AUDIT) == []
        watched.evaluate("document.querySelector('#graph svg').removeAttribute('aria-label')")
        watched.evaluate("document.querySelector('label:has(#filter)').replaceWith(document.querySelector('#filter'))")
        watched.evaluate("document.querySelector('#map-note').style.color = '#808080'")
        assert {problem.split()[0] for problem in watched.evaluate(AUDIT)} == {"no", "contrast"}
        assert len(watched.evaluate(AUDIT)) == 3
        watched.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_layout(browser, pages, width, dark):
    """Nothing is wider than the window; every drawing has a text, and more than one colour; words can be read."""
    watched = Watched(browser, pages[0] / "digits.html", width, dark)
    assert watched.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = watched.evaluate(
        "[...document.querySelectorAll('canvas, svg')].filter(e => !e.closest('[hidden]')"
        " && !e.getAttribute('aria-label') && e.getAttribute('aria-hidden') !== 'true').length"
    )
    assert unnamed == 0
    plain = watched.evaluate(
        "[...document.querySelectorAll('canvas[role=img]')].filter(c => { const d = new Uint32Array("
        "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer); return d.every(v => v === d[0]) }).map("
        "c => c.getAttribute('aria-label'))"
    )
    assert [name for name in plain if "split" not in name and "steps" not in name] == []
    image = watched.screenshot(full_page=True)
    assert len(image) > 30_000
    watched.close()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    path = tmp_path_factory.mktemp("drawn") / "page.html"
    path.write_text(drawn_page())
    return path


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_screenshots(browser, drawn, window):
    """Drawings look like the stored ones, in other fonts as well; what is broken does not."""
    opened = open_in(browser, drawn, window)
    expected = stored(window)
    assert unlike(shrunk(opened), expected) == []
    opened.evaluate("document.body.style.fontFamily = 'serif'")
    assert unlike(shrunk(opened), expected) == []
    for change, drawings in (
        ("places = places.map(([x, y]) => [x / 2, y]); drawMap()", {"#map"}),
        ("document.querySelectorAll('#graph line').forEach(line => line.remove())", {"#graph"}),
        ("document.querySelectorAll('#heat canvas').forEach(c => c.width = c.width)", {DRAWINGS[3]}),
        ("document.querySelectorAll('#histograms canvas').forEach(c => c.width = c.width)", {"#histograms"}),
    ):
        opened.evaluate(change)
        assert drawings <= set(unlike(shrunk(opened), expected)), change
    opened.context.close()
    opened = open_in(browser, drawn, window)
    opened.evaluate("document.querySelector('style').remove()")
    assert len(unlike(shrunk(opened), expected)) >= 2
    opened.context.close()


def test_hostile_names_run_no_script(browser, pages):
    watched = Watched(browser, pages[0] / "hostile.html")
    watched.drag("#map", [(0.01, 0.01), (0.99, 0.01), (0.99, 0.9), (0.01, 0.9), (0.01, 0.02)])
    watched.click("#collections button:nth-child(2)")
    for column in watched.evaluate("state.collection.columns.map(column => column.name)"):
        watched.select_option("#colour", column)
    watched.select_option("#pick", "3")
    for name in HOSTILE:
        assert name in watched.evaluate("document.body.innerText + document.querySelector('#pick').textContent")
    assert watched.evaluate("window.hacked === undefined")
    assert watched.evaluate("document.scripts.length") == 2
    assert watched.evaluate("document.images.length") == 0
    watched.close()


def test_hostile_names_of_files_and_runs(browser, pages, tmp_path):
    """Markup in the names of files, folders, runs, models and architectures is text in the page and in the report."""
    run = pages[1]
    folder = tmp_path / "<img src=x onerror=window.hacked=1>"
    folder.mkdir()
    tensors = {"0.weight": torch.randn(5, 2), "0.bias": torch.zeros(5), "1.weight": torch.randn(3, 5)}
    tensors["1.bias"] = torch.zeros(3)
    for name in ("'\"><svg onload=window.hacked=1>", "<script>window.hacked=1<script>"):
        torch.save(tensors, folder / f"{name}.pth")
    collection = collections_of([str(folder)], InputOptions("relu", 30.0))[0]
    explanation = run.featured[0]["explanation"] | {"meaning": f"log-odds of class {HOSTILE[1]}"}
    shown = replace(run, featured=[run.featured[0] | {"explanation": explanation}])
    (tmp_path / "page.html").write_text(page([collection, shown]))
    watched = Watched(browser, tmp_path / "page.html")
    assert "<svg onload=window.hacked=1>" in watched.text("#table")
    assert str(folder) in watched.text("#pick") or "<img" in watched.text("#pick")
    watched.click("#collections button:nth-child(2)")
    assert HOSTILE[1] in watched.text("#explanation-note")
    assert watched.evaluate("window.hacked === undefined")
    assert watched.evaluate("document.images.length") == 0
    watched.close()

    runs = tmp_path / "runs" / "<svg onload=window.hacked=1>"
    (runs / "figures").mkdir(parents=True)
    (runs / "config.yml").write_text(json.dumps({"model": HOSTILE[0], "train_args": {"seed": 0}}))
    (runs / "metrics.jsonl").write_text(json.dumps({"epoch": 0, "train_loss": 1.0, f"val_{HOSTILE[1]}": 0.5}) + "\n")
    data = {"zoo": HOSTILE[1], "sha256": "ab" * 32, "read": HOSTILE[2], "networks": {"train": 5}}
    summary = {f"test_{HOSTILE[2]}": 0.5, "data": data, "versions": {HOSTILE[0]: HOSTILE[1]}, "git_commit": None}
    (runs / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "report.html").write_text(report(find_runs([tmp_path / "runs"])))
    watched = Watched(browser, tmp_path / "report.html")
    assert "<svg onload=window.hacked=1>" in watched.text("#results")
    assert HOSTILE[1] in watched.text("body")
    assert watched.evaluate("window.hacked === undefined")
    assert watched.evaluate("document.scripts.length") == 1
    watched.close()


def test_a_script_that_got_in_would_not_run(browser, pages, tmp_path):
    """The control: markup that is put into the file itself meets the page's policy."""
    text = (pages[0] / "hostile.html").read_text().replace("<main>", f"<main>{HOSTILE[1]}{HOSTILE[0][9:]}", 1)
    (tmp_path / "page.html").write_text(text)
    context = browser.new_context()
    opened = context.new_page()
    opened.goto((tmp_path / "page.html").as_uri())
    opened.wait_for_selector("html[data-ready=yes]", state="attached")
    assert opened.evaluate("document.scripts.length") == 3
    assert opened.evaluate("window.hacked === undefined")
    context.close()


def test_edits(browser, pages, tmp_path):
    """before, after and the slider: theta + t delta, as in Python."""
    run = pages[1]
    params = run.nets.take(torch.tensor([0]))
    assert isinstance(params, NetParams)
    from scalegmn.explore.featured import encoded

    delta = 0.1 * torch.randn(params.flatten().shape, generator=torch.Generator().manual_seed(0))
    target = render(params, 8, 8)
    edit = {"changes": encoded(delta), "name": "edit", "target": {"shape": [8, 8, 1], "values": encoded(target)}}
    (tmp_path / "edit.html").write_text(page([replace(run, featured=[{"row": 0, "edit": edit}])]))
    watched = Watched(browser, tmp_path / "edit.html")
    captions = "[...document.querySelectorAll('#edits figcaption')].map(caption => caption.textContent)"
    for presses, strength in ((0, 1.0), (40, 0.6)):
        watched.slide("#strength", "ArrowLeft", presses)
        changed = params.unflatten(params.flatten() + strength * delta)
        error = (render(changed, 8, 8) - target).square().mean().item()
        before, goal, after, difference = watched.evaluate(captions)
        assert (before, goal, difference) == ("before", "target", "difference from the target")
        assert after.startswith(f"after, t = {strength:g}, squared error ")
        assert float(after.rpartition(" ")[2]) == pytest.approx(error, rel=1e-3)
    watched.close()


def test_the_report(browser, tmp_path):
    """Bands over seeds, figures that open large, curves that zoom by dragging and by keys."""
    for model, seed in (("a", 0), ("a", 1), ("b", 0)):
        folder = tmp_path / "runs" / f"{model}{seed}"
        (folder / "figures").mkdir(parents=True)
        (folder / "config.yml").write_text(f"model: {model}\ntrain_args: {{seed: {seed}}}\n")
        rows = [{"epoch": epoch, "train_loss": 1 / (1 + epoch), "val_tau": 0.1 * epoch} for epoch in range(9)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"zoo": HOSTILE[1], "sha256": "ab" * 32, "read": "as stored", "networks": {"train": 5}}
        result = {"a0": 0.5, "a1": 0.7, "b0": 0.1}[folder.name]
        summary = {"test_tau": result, "data": data, "versions": {}, "git_commit": None}
        (folder / "summary.json").write_text(json.dumps(summary))
        Image.new("RGB", (900, 300), (10 * seed, 90, 90)).save(folder / "figures" / "curves.png")
    runs = find_runs([tmp_path / "runs"])
    (tmp_path / "report.html").write_text(report(runs))
    for width in (400, 1280):
        watched = Watched(browser, tmp_path / "report.html", width)
        assert watched.evaluate("document.documentElement.scrollWidth") <= width
        band = watched.locator("svg.band")
        assert band.count() == 1
        assert band.get_attribute("aria-label") == "mean 0.6, standard deviation 0.1414, 2 runs"
        assert watched.locator("#charts svg").count() == 2
        watched.drag("#charts figure:first-child svg", [(0.3, 0.5), (0.6, 0.5)])
        low, high = map(float, watched.get_attribute("#charts figure:first-child svg", "data-range").split(","))
        left, right = 48 / 440, 430 / 440
        expected = [8 * (x - left) / (right - left) for x in (0.3, 0.6)]
        assert [low, high] == pytest.approx(expected, abs=0.1)
        watched.focus("#charts figure:first-child svg")
        watched.keyboard.press("Escape")
        assert watched.get_attribute("#charts figure:first-child svg", "data-range") == "0,8"
        watched.keyboard.press("+")
        assert watched.get_attribute("#charts figure:first-child svg", "data-range") == "2,6"
        watched.click("button.large >> nth=0")
        large = watched.locator("dialog img").bounding_box()
        assert large["width"] > 0.6 * width
        watched.keyboard.press("Escape")
        assert not watched.is_visible("dialog")
        assert watched.evaluate("window.hacked === undefined")
        assert watched.evaluate(AUDIT) == []
        watched.close()
