"""The data of the page, without a browser."""

import base64
import json
import urllib.error
import urllib.request
from threading import Thread

import numpy as np
import pytest
import torch
from commands import assert_refused, run_command

from scalegmn.experiments.trained import load
from scalegmn.explore.architectures import described
from scalegmn.explore.content import (
    PARAMETER_BYTES,
    collections_of,
    of_run,
    of_zoo,
    principal_components,
    statistics_of,
)
from scalegmn.explore.featured import Move, single_moves
from scalegmn.explore.page import LARGEST, MARK, embedded, page
from scalegmn.explore.serve import server_of
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.networks.siren import init_siren, render
from scalegmn.symmetry.groups import GroupElement
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo


def test_a_zoo(digits):
    zoo = open_zoo(digits.zoo)
    content = of_zoo(digits.zoo).content()
    assert len(content["names"]) == len(zoo)
    columns = {column["name"]: column for column in content["columns"]}
    assert columns["label"]["kind"] == "category"
    assert columns["label"]["values"] == zoo.columns["label"].tolist()
    assert columns["psnr"]["values"] == pytest.approx(zoo.columns["psnr"].tolist(), rel=1e-5)
    images = content["images"]
    pixels = np.frombuffer(base64.b64decode(images["pixels"]), np.uint8).reshape(len(zoo), 8, 8)
    drawn = render(zoo.params, 8, 8)[..., 0].clamp(0, 1)
    assert np.abs(pixels / 255 - drawn.numpy()).max() <= 0.5 / 255 + 1e-6
    flat = np.frombuffer(base64.b64decode(content["parameters"]["values"]), np.float32)
    assert (flat.reshape(len(zoo), -1) == zoo.params.flatten().numpy()).all()


def test_the_map_is_invariant(digits, generator):
    """Places of moved networks are their places; those of other networks are not."""
    params = open_zoo(digits.zoo).params.to(torch.float64)
    moved = GroupElement.sample(params, generator).act(params)
    before, after = (statistics_of(Networks((nets,), {})) for nets in (params, moved))
    assert (before - after).abs().max() <= 1e-9 * before.abs().max()
    assert (before - before.flip(0)).abs().max() > 1e-3


def test_principal_components():
    """Of points near a line in many dimensions, the place on the line."""
    t = torch.linspace(-1, 1, 50, dtype=torch.float64)
    x, y = principal_components(t[:, None] * torch.tensor([[1.0, 2.0, -3.0, 0.0]], dtype=torch.float64))
    assert torch.corrcoef(torch.stack([x, t]))[0, 1].abs() > 1 - 1e-12
    assert y.abs().max() < 1e-9
    assert principal_components(torch.ones(3, 4))[0].tolist() == [0, 0, 0]


def test_a_run(digits, shown_run):
    content = shown_run.content()
    columns = {column["name"]: column for column in content["columns"]}
    assert set(columns["split"]["names"]) == {"test"}
    model, zoo = load(digits.run), open_zoo(digits.zoo)
    expected = model(zoo.take(zoo.splits["test"])).argmax(1).tolist()
    predicted = [int(columns["prediction"]["names"][value]) for value in columns["prediction"]["values"]]
    assert predicted == expected
    assert content["map"]["of"] == "the model's last features"
    right = sum(columns["correct"]["names"][value] == "yes" for value in columns["correct"]["values"])
    assert right / len(predicted) == pytest.approx(model.summary["test_accuracy"])


def test_the_model_keeps_its_answer_and_the_mlp_does_not(shown_run):
    for entry in shown_run.featured:
        answers = np.array([*entry["moves"].values(), *entry["walk_answers"]])
        assert (answers[:, 0] == answers[0, 0]).all()
        assert np.abs(answers[:, 1] - answers[0, 1]).max() < 1e-3  # single precision
        assert np.abs(answers[:, 3] - answers[0, 3]).max() > 1e-2
    assert len({entry["row"] for entry in shown_run.featured}) == len(shown_run.featured) == 6


@pytest.mark.parametrize("kind", ["sine", "tanh", "relu"])
def test_moves_keep_the_function(kind, random_params, generator):
    spec = NetSpec.mlp([2, 5, 4, 1], kind, w0=6.0)
    params, points = random_params(spec, 1), torch.rand(20, 2, generator=generator, dtype=torch.float64)
    moves = single_moves(params)
    kinds = {"sine": {"swap", "flip", "phase"}, "tanh": {"swap", "flip"}, "relu": {"swap", "scale"}}
    assert {move.kind for move in moves} == kinds[kind]
    for move in moves:
        moved = move.act(params)
        assert (evaluate(moved, points) - evaluate(params, points)).abs().max() <= 1e-9
        assert (moved.flatten() - params.flatten()).abs().max() > 1e-6
    wrong = Move("scale", 0, 0, -1.7 if kind == "relu" else 2.0)
    assert (evaluate(wrong.act(params), points) - evaluate(params, points)).abs().max() > 1e-3


def test_moves_of_cnns(cnn_spec, random_params, generator):
    params, images = random_params(cnn_spec, 1), torch.rand(3, 1, 6, 6, generator=generator, dtype=torch.float64)
    expected = evaluate_cnn(params, images)
    for move in single_moves(params):
        assert (evaluate_cnn(move.act(params), images) - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_what_neurons_are():
    """Of the middle layer two are coupled by a residual connection to those of the first, which are tied to it."""
    layers = (LayerSpec(2, 4, None, "relu"), LayerSpec(4, 4, None, "relu", residual=0), LayerSpec(4, 1))
    first, second, last = described(NetSpec(layers))["layers"]
    assert (first["neurons"], second["neurons"], last["neurons"]) == ("tied to layer 1", "tied to layer 0", "output")
    assert not first["movable"]
    assert described(NetSpec.mlp([2, 3, 1], "relu"))["layers"][0]["neurons"] == "free"


def test_data_cannot_leave_their_block():
    hostile = {"</script><script>alert(1)</script>": "<!--<script>&amp;\u2028"}
    text = embedded(hostile)
    assert not set("<>&") & set(text)
    assert json.loads(text) == hostile


def test_the_page_has_no_links(shown_run):
    text = page([shown_run])
    assert text.count(MARK) == 1
    assert MARK in text[:500]
    for word in ("src=", "href=", "@import", "url(", "fetch(", "XMLHttpRequest", "innerHTML", "eval("):
        assert word not in text, word
    assert text.replace("http://www.w3.org/2000/svg", "").count("http") == 1  # http-equiv


def test_the_command(digits, monkeypatch, capsys, tmp_path):
    out = tmp_path / "pages" / "digits.html"
    code, text, error = run_command(
        ["explore", "zoo", "--networks=20", f"--out={out}"], digits.folder, monkeypatch, capsys
    )
    assert (code, error) == (0, "")
    assert text.startswith(f"{out}: 20 networks, ")
    assert run_command(["explore", "zoo", f"--out={out}"], digits.folder, monkeypatch, capsys)[0] == 0  # written anew
    other = tmp_path / "mine.html"
    other.write_text("mine")
    refused = run_command(["explore", "zoo", f"--out={other}"], digits.folder, monkeypatch, capsys)
    assert_refused(refused, "exists already, and is no page of scalegmn explore")
    assert other.read_text() == "mine"
    refused = run_command(["explore", "nothing"], digits.folder, monkeypatch, capsys)
    assert_refused(refused, "nothing: no such file or folder, expected a zoo, a run, a bundle or a network")
    refused = run_command(["explore", "zoo", "--networks=0"], digits.folder, monkeypatch, capsys)
    assert_refused(refused, "--networks: found 0, expected at least 1")
    refused = run_command(["explore", "zoo", "--serve=99999"], digits.folder, monkeypatch, capsys)
    assert_refused(refused, "--serve: found 99999, expected a port from 0 to 65535")
    refused = run_command(["explore", "zoo", "--out=."], digits.folder, monkeypatch, capsys)
    assert_refused(refused, "--out: . is a folder, expected a file")


def test_networks_in_files(digits, monkeypatch, tmp_path):
    from onnx_files import chain, write_onnx

    for number in range(3):
        tensors = [torch.randn(shape) for shape in ((5, 2), (5,), (1, 5), (1,))]
        write_onnx(tmp_path / f"net{number}.onnx", chain(tensors, "tanh", w0=1.0))
    (collection,) = collections_of([str(tmp_path)])
    content = collection.content()
    assert [name.rpartition("/")[2] for name in content["names"]] == ["net0.onnx", "net1.onnx", "net2.onnx"]
    assert content["images"]["channels"] == 1
    assert content["parameters"]["count"] == 3


def test_parameters_beyond_the_budget_are_left_out(digits):
    collection = of_zoo(digits.zoo)
    content = collection.content(5000)
    size = collection.nets.spec.num_parameters
    assert content["parameters"]["count"] == 5000 // (4 * size) < len(content["names"])
    assert len(base64.b64decode(content["parameters"]["values"])) == content["parameters"]["count"] * size * 4


def test_pages_of_large_zoos_are_small(tmp_path):
    """2,000 SIRENs of MNIST's size, twice: two collections share the room for parameters."""
    generator = torch.Generator().manual_seed(0)
    params = init_siren(NetSpec.mlp([2, 32, 32, 1], "sine"), 2000, generator)
    label = torch.arange(2000) % 10
    splits = {"train": torch.arange(1000), "val": torch.arange(1000, 1500), "test": torch.arange(1500, 2000)}
    write_zoo(tmp_path / "zoo", [Networks((params,), {"label": label})], splits, {"image_shape": [28, 28, 1]})
    collection = of_zoo(tmp_path / "zoo")
    text = page([collection, collection])
    assert 10**6 < len(text) <= LARGEST == 15 * 10**6
    count = PARAMETER_BYTES // (2 * 4 * params.spec.num_parameters)
    assert text.count(f'"parameters":{{"count":{count},') == 2


def test_a_page_that_is_too_large_is_refused(digits, monkeypatch):
    monkeypatch.setattr("scalegmn.explore.page.LARGEST", 9000)
    with pytest.raises(ValueError, match=r"the page of 12 networks has .* bytes, expected at most 9,000"):
        page([of_zoo(digits.zoo, 12)])


def test_the_server_is_for_this_machine_alone():
    with server_of("<p>page</p>") as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert urllib.request.urlopen(f"{address}/").read() == b"<p>page</p>"
            for path, host, status in (("/other", None, 404), ("/", "evil.example", 403)):
                request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
                with pytest.raises(urllib.error.HTTPError) as error:
                    urllib.request.urlopen(request)
                assert error.value.code == status
        finally:
            server.shutdown()
            thread.join()


def test_a_port_in_use():
    with server_of("page") as server, pytest.raises(ValueError, match="--serve: port"):
        server_of("page", server.server_port)


def test_networks_of_several_activations_can_be_renumbered():
    spec = NetSpec.mlp([2, 3, 1], "hetero")
    layer = described(spec)["layers"][0]
    assert (layer["movable"], layer["signs"], layer["scales"], layer["phases"]) == (True, False, False, False)


def test_a_bundle_with_a_page(digits, monkeypatch, capsys):
    words = ["export", "--checkpoint", "run", "--out", "bundle", "--page"]
    assert run_command(words, digits.folder, monkeypatch, capsys)[0] == 0
    bundle = digits.folder / "bundle"
    assert {path.name for path in bundle.iterdir()} == {"model.safetensors", "config.json", "README.md", "page.html"}
    assert "[page.html](page.html)" in (bundle / "README.md").read_text()
    assert MARK in (bundle / "page.html").read_text()[:500]
    assert load(bundle).task == "classification"
    assert_refused(run_command(words, digits.folder, monkeypatch, capsys), "--out: bundle exists already")


def test_of_large_networks_fewer_are_shown_in_depth(digits, monkeypatch):
    monkeypatch.setattr("scalegmn.explore.featured.FEATURED_PARAMETERS", 250)
    monkeypatch.chdir(digits.folder)
    run = of_run(digits.run, 12)
    assert len(run.featured) == 250 // run.nets.spec.num_parameters == 2
