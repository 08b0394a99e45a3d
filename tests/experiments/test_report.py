"""The page that compares runs, read back by a parser and by a browser."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml

from scalegmn.cli import main
from scalegmn.experiments.report import find_runs, page

EVIL = "<script>alert('&\"x\"')</script>"


@pytest.fixture
def runs(tmp_path):
    """Two finished runs and an unfinished one, with a name, a value and a commit that are HTML."""
    for number, name in enumerate(("first", "<b>second", "third")):
        folder = tmp_path / "runs" / name
        (folder / "figures").mkdir(parents=True)
        config = {"batch_size": 8, "data": {"dataset_path": EVIL}, "train_args": {"seed": number}}
        (folder / "config.yml").write_text(yaml.safe_dump(config))
        rows = [
            {"epoch": e, "train_loss": 2.0 - e, "val_loss": 1.0, "val_tau": 0.1 * e, "seconds": 1.0} for e in (0, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epo')
        if name != "third":
            data = {"zoo": EVIL, "sha256": "ab" * 32, "read": "as stored", "networks": {"train": 1234}}
            summary = {"test_tau": (9.5, 12.25)[number], "epochs": 2, "device": "cpu", "data": data, "git_commit": EVIL}
            (folder / "summary.json").write_text(json.dumps({**summary, "versions": {"torch": "2.6"}}))
            matplotlib.image.imsave(folder / "figures" / "confusion_matrix.png", np.zeros((4, 4)))
    return tmp_path / "runs"


class Parts(HTMLParser):
    """Tags, the text of cells, and all addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.addresses, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page(runs):
    text = page(find_runs([runs]))
    parts = Parts(text)
    assert parts.open == []
    assert parts.tags.count("script") == 1
    assert "b" not in parts.tags
    assert parts.tags.count("img") == 4  # and the one that opens large
    assert all(address.startswith("data:image/png;base64,") for address in parts.addresses)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # the name of SVG, no address
    for value in ("<b>second", "unfinished", "12.25", "train_args.seed", EVIL, "1,234 train", "confusion matrix"):
        assert value in parts.texts, value
    assert "batch_size" not in parts.texts  # the same in all runs
    assert "3 runs, 1 unfinished" in parts.texts


def test_command(runs, tmp_path, monkeypatch, capsys):
    def report(*words):
        monkeypatch.setattr(sys, "argv", ["scalegmn", "report", *map(str, words)])
        main()

    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "<b>second", runs / "whole")
    report(runs / "third", "--out=one.html")
    assert "1 run, 1 unfinished" in (tmp_path / "one.html").read_text()
    report(runs / "first", runs / "third", "--out=one.html")  # ours: written anew
    assert "2 runs, 1 unfinished" in (tmp_path / "one.html").read_text()
    report(Path("runs/first"), runs / "first", "--out=one.html")  # the same run
    assert "<title>scalegmn: 1 run<" in (tmp_path / "one.html").read_text()
    (tmp_path / "own.html").write_text("mine")
    (runs / "first" / "summary.json").write_text("{")
    (runs / "third" / "metrics.jsonl").write_text('{"val_loss": 1}\n')
    (runs / "<b>second" / "metrics.jsonl").write_text("5\n")
    capsys.readouterr()
    for words, message in (
        ([runs / "third", "--out=own.html"], "own.html exists already, and is no report"),
        ([tmp_path / "nothing"], "nothing: no config.yml"),
        ([runs / "first"], "first/summary.json: damaged"),
        ([runs / "third"], "third/metrics.jsonl: damaged (a line without epoch)"),
        ([runs / "<b>second"], "second/metrics.jsonl: damaged"),
        ([runs / "whole", "--out=missing/report.html"], "cannot be written (No such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            report(*words)
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1), error
        assert message in error
    assert (tmp_path / "own.html").read_text() == "mine"


def test_in_a_browser(runs, tmp_path):
    """Its script runs, the page's own only: a click on test_tau sorts the runs, those without a value last."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    text = page(find_runs([runs]))
    click = "<script>for (const h of document.querySelectorAll('#results th')) if (h.textContent == 'test_tau') %s"
    shown = {}
    for name, clicks in (("once", "h.click()"), ("twice", "{ h.click(); h.click() }")):
        file = tmp_path / f"{name}.html"
        file.write_text(text.replace("</body>", click % clicks + "</script></body>"))
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        words += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / name}", "--dump-dom"]
        done = subprocess.run([browser, *words, file.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        cells = Parts(done.stdout.partition("<tbody>")[2].partition("</tbody>")[0]).texts
        shown[name] = [cell for cell in cells if cell in ("first", "<b>second", "third")]
    assert shown == {"once": ["first", "<b>second", "third"], "twice": ["<b>second", "first", "third"]}
