"""The data of the page, without a browser."""

import base64
import json
import urllib.error
import urllib.request
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import torch
from commands import assert_refused, run_command, run_here

from scalegmn.experiments.trained import load
from scalegmn.explore.answers import answers_of, inputs_of_zoo, shares
from scalegmn.explore.architectures import described
from scalegmn.explore.content import (
    PARAMETER_BYTES,
    _architectures,
    answers_and_features,
    collections_of,
    of_run,
    of_zoo,
    statistics_of,
)
from scalegmn.explore.explain import default_method, explain
from scalegmn.explore.featured import Move, single_moves
from scalegmn.explore.maps import places, principal_components
from scalegmn.explore.page import LARGEST, MARK, embedded, page
from scalegmn.explore.serve import server_of
from scalegmn.interop.network_files import InputOptions
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.networks.siren import init_siren, render
from scalegmn.symmetry.groups import GroupElement
from scalegmn.zoos.fit.cnn_zoo import as_read
from scalegmn.zoos.images import load_digits_images
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


@pytest.mark.slow
def test_umap(monkeypatch):
    """Networks of two groups are in two groups; the places are the same on every call."""
    pytest.importorskip("umap")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 8, generator=generator)
    features[30:] += 8
    x, y, kind = places(features, "umap")
    points = torch.stack([x, y], 1)
    assert kind == "UMAP"
    near, far = torch.cdist(points[:30], points[:30]).mean(), torch.cdist(points[:30], points[30:]).mean()
    assert far > 2 * near
    assert (torch.stack(places(features, "umap")[:2], 1) == points).all()
    assert places(features[:15], "umap")[2] == "principal components"


def test_umap_that_is_not_installed(digits, monkeypatch, capsys):
    monkeypatch.setattr("scalegmn.explore.maps.find_spec", lambda name: None)
    refused = run_command(["explore", "zoo", "--map=umap"], digits.folder, monkeypatch, capsys)
    assert_refused(refused, "--map umap: umap-learn is not installed; `pip install 'scalegmn[explore]'`, or --map pca")
    refused = run_command(["explore", "zoo", "--map=tsne"], digits.folder, monkeypatch, capsys)
    assert_refused(refused, "--map: found tsne, expected one of pca, umap")


@pytest.fixture(scope="module")
def cnns(tmp_path_factory):
    """A zoo of small CNNs, made in seconds."""
    folder = tmp_path_factory.mktemp("cnns")
    words = (
        "--out=zoo --images=digits --networks=16 --channels=[4,4] --checkpoints=[0,6] --padding=same --batch_size=32"
    )
    done = run_here("-m", "scalegmn", "zoo", "cnn", *words.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "zoo"


def test_what_classifiers_answer(cnns):
    """Shares on the page are those of the networks, for images as they were trained on: they have the accuracies that
    the zoo states. Optimisers have names."""
    zoo = open_zoo(cnns)
    collection = of_zoo(cnns)
    answers = collection.answers
    assert answers["of"] == "the first image of each class of digits"
    assert answers["labels"] == list(range(10))
    inputs = inputs_of_zoo(zoo, None)
    (params,) = zoo.nets
    expected = evaluate_cnn(params, inputs.values).softmax(2)
    (values,) = answers["values"]
    shown = np.frombuffer(base64.b64decode(values["shares"]), np.uint8).reshape(expected.shape)
    assert np.abs(shown / 255 - expected.numpy()).max() <= 0.5 / 255 + 1e-6
    images = load_digits_images()
    all_images = replace(inputs, values=as_read(images.take(torch.arange(len(images))), True))
    accuracy = (shares(params, all_images).argmax(2) == images.labels).float().mean(1)
    test = zoo.columns["test_accuracy"]
    assert (accuracy - test).abs().max() < 0.06
    assert test.max() > 0.5 > test.min()
    assert (accuracy - test.flip(0)).abs().max() > 0.2
    assert set(collection.columns["optimizer"]) <= {"sgd", "adam", "rmsprop"}


def test_features_are_in_the_order_of_the_networks(cnns):
    """Models compute networks of one activation together; the map shows each where its own features are, of which the
    outputs are a linear function. Accuracies are explained by gradient x weight."""
    (cnns.parent / "run.yml").write_text(
        "data: {dataset_path: zoo}\nbatch_size: 8\ntrain_args: {num_epochs: 1}\n"
        "scalegmn_args: {symmetry: hetero, hidden_dim: 4, out_dim: 1, out_scale: 1.0}\n"
    )
    words = ["train", "generalization", "--conf", "run.yml", "--run_dir=run"]
    done = run_here("-m", "scalegmn", *words, cwd=cnns.parent)
    assert done.returncode == 0, done.stderr
    model, zoo = load(cnns.parent / "run"), open_zoo(cnns)
    (params,) = zoo.nets
    assert len(params.activation.unique()) == 2
    outputs, features = answers_and_features(model, Networks((params,), {}))
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(0))
    moved_outputs, moved = answers_and_features(model, Networks((params[order],), {}))
    assert (moved - features[order]).abs().max() <= 1e-5 * features.abs().max()
    assert (features - features[order]).abs().max() > 1e-2 * features.abs().max()
    assert (moved_outputs - outputs[order]).abs().max() <= 1e-5 * outputs.abs().max()
    known = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    solution = torch.linalg.lstsq(known, outputs.double()).solution
    assert features.shape[1] < len(features) / 2
    assert (known @ solution - outputs).abs().max() < 1e-4 * outputs.std()
    assert explain(model, params[:1], None).method == default_method(model) == "gradient"


def test_inputs_that_are_not_there(cnns):
    """Noise stands for images that cannot be loaded; zoos of others are asked nothing."""
    zoo = open_zoo(cnns)
    other = replace(zoo, provenance=zoo.provenance | {"image_source": "others"})
    inputs = inputs_of_zoo(other, None)
    assert inputs.words == "images of noise"
    assert (inputs.labels, inputs.values.shape[1:]) == (None, (1, 8, 8))
    assert inputs_of_zoo(replace(zoo, provenance={}), None) is None


def test_points_for_large_chains(random_params):
    params = random_params(NetSpec.mlp([5, 8, 3], "relu"), 2)
    answers = answers_of(Networks((params,), {}), None)
    assert answers["of"] == "inputs drawn from a standard normal distribution"
    assert answers["values"][0]["classes"] == 3
    assert answers_of(Networks((random_params(NetSpec.mlp([2, 8, 3], "relu"), 2),), {}), None) is None
    assert answers_of(Networks((random_params(NetSpec.mlp([5, 8, 1], "relu"), 2),), {}), None) is None


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
    assert (first["kinds"], second["kinds"], last["kinds"]) == ([[0, 4, "tied"]], [[0, 4, "tied"]], [[0, 1, "output"]])
    assert described(NetSpec.mlp([2, 3, 1], "relu"))["layers"][0]["neurons"] == "free"
    partly = (LayerSpec(2, 2, None, "relu"), LayerSpec(2, 4, None, "relu", residual=0), LayerSpec(4, 1))
    assert described(NetSpec(partly))["layers"][1]["kinds"] == [[0, 2, "tied"], [2, 4, "free"]]
    pinned = (LayerSpec(2, 3, None, "relu", pinned=True), LayerSpec(3, 1))
    assert described(NetSpec(pinned))["layers"][0]["kinds"] == [[0, 3, "pinned"]]


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
    (collection,) = collections_of([str(tmp_path)], InputOptions(None, 30.0))
    content = collection.content()
    assert [name.rpartition("/")[2] for name in content["names"]] == ["net0.onnx", "net1.onnx", "net2.onnx"]
    assert content["images"]["channels"] == 1
    assert content["parameters"]["count"] == 3


def test_networks_of_words_made_by_code(monkeypatch, capsys, tmp_path):
    words = ["explore", "factories:bag", "--input_shape=2,5"]
    refused = run_command(words, tmp_path, monkeypatch, capsys)
    assert_refused(refused, "factories:bag: ")
    assert_refused(refused, "for an input of whole numbers below N set --words N")
    assert run_command([*words, "--words=9"], tmp_path, monkeypatch, capsys)[0] == 0
    assert b"factories:bag" in (tmp_path / "page.html").read_bytes()


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


def test_networks_of_several_activations_have_the_moves_of_their_own(random_params):
    spec = NetSpec.mlp([2, 3, 2], "hetero")
    numbers = torch.tensor([spec.activations.index(name) for name in ("relu", "tanh", "relu")])
    drawn = random_params(NetSpec.mlp([2, 3, 2], "tanh"), 3)
    params = NetParams(spec, drawn.weights, drawn.biases, numbers)
    found, index = _architectures(Networks((params,), {}))
    by_name = {architecture["layers"][0]["activation"]: architecture for architecture in found}
    assert [found[place]["layers"][0]["activation"] for place in index] == ["relu", "tanh", "relu"]
    assert {name: architecture["text"] for name, architecture in by_name.items()} == {
        "relu": "MLP [2, 3, 2] (relu)",
        "tanh": "MLP [2, 3, 2] (tanh)",
    }
    x = torch.randn(5, 2, dtype=torch.float64)
    for row, kinds in ((0, {"scale", "swap"}), (1, {"flip", "swap"})):
        own = params[row : row + 1]
        moves = single_moves(own)
        assert {move.kind for move in moves} == kinds
        for move in moves:
            moved = move.act(own)
            assert (moved.weights[0] != own.weights[0]).any()
            torch.testing.assert_close(evaluate(moved, x), evaluate(own, x), rtol=1e-12, atol=1e-12)


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
