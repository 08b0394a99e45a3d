"""`scalegmn explain` on a small trained run of digits."""

import json
import shutil

import torch
from commands import assert_refused, run_command

from scalegmn.experiments.trained import load
from scalegmn.explore.explain import explain
from scalegmn.symmetry.groups import GroupElement, PhaseShift
from scalegmn.zoos.zoo_format import open_zoo


def test_removing_the_top_neurons_changes_the_prediction_more_than_random_ones(digits):
    """The mean drop of the log-odds over test networks, after 1 to 3 neurons of 16."""
    model, zoo = load(digits.run), open_zoo(digits.zoo)
    drops, by_chance = torch.zeros(3), torch.zeros(3)
    rows = zoo.splits["test"][:8]
    for row in rows:
        result = explain(model, zoo.take(row[None]), zoo)
        drops += (result.curve[0] - result.curve[1:4]) / len(rows)
        by_chance += (result.curve[0] - result.random.mean(0)[1:4]) / len(rows)
    assert (drops > by_chance).all(), (drops, by_chance)
    assert drops[0] > 1.5 * by_chance[0]


def test_explanations_of_moved_networks_are_the_moved_explanations(digits, generator):
    model, zoo = load(digits.run), open_zoo(digits.zoo)
    model.metanetwork(zoo.spec).double()
    params = zoo.take(zoo.splits["test"][:1]).to(torch.float64)
    element = GroupElement.sample(params, generator)
    moved = element.act(PhaseShift.sample(params, generator).act(params))
    before, after = (explain(model, nets, zoo) for nets in (params, moved))
    values, expected = after.attribution.values.flatten(), before.attribution.moved(element).values.flatten()
    assert (values - expected).abs().max() <= 1e-9 * values.abs().max()
    places = element.permutations
    assert [(layer, int(places[layer][0, neuron])) for layer, neuron in after.ranked] == before.ranked
    assert (after.curve - before.curve).abs().max() <= 1e-9 * before.curve.abs().max()


def ask(digits, monkeypatch, capsys, *words):
    return run_command(["explain", "--checkpoint", "run", *words], digits.folder, monkeypatch, capsys)


def test_table_json_and_figure(digits, monkeypatch, capsys):
    code, table, error = ask(digits, monkeypatch, capsys, "net.pth")
    assert (code, error) == (0, "")
    assert table.splitlines()[0].startswith("log-odds of class ")
    assert len(table.splitlines()) == 2 + 16 + 1
    figure = digits.folder / "explanation.png"
    code, text, error = ask(digits, monkeypatch, capsys, "net.pth", "--format=json", f"--figure={figure}")
    assert (code, error) == (0, "")
    content = json.loads(text)
    total = sum(torch.tensor(value).sum() for value in content["weights"] + content["biases"])
    assert abs(total - (content["score"] - content["reference_score"])) < 1e-2
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert_refused(ask(digits, monkeypatch, capsys, "net.pth", f"--figure={figure}"), "exists already")
    figure.unlink()


def test_hostile_class_names(digits, monkeypatch, capsys):
    """Class names are text in the table and in the figure, not markup and not formulas."""
    shutil.copytree(digits.folder / "run", digits.folder / "hostile")
    summary = json.loads((digits.folder / "hostile" / "summary.json").read_text())
    hostile = "<script>$\\frac{$</script>"
    summary["data"]["classes"] = [hostile] * 10
    (digits.folder / "hostile" / "summary.json").write_text(json.dumps(summary))
    words = ["explain", "--checkpoint", "hostile", "net.pth", "--figure=hostile.png"]
    code, table, error = run_command(words, digits.folder, monkeypatch, capsys)
    assert (code, error) == (0, "")
    assert table.startswith(f"log-odds of class {hostile}: ")
    assert (digits.folder / "hostile.png").read_bytes().startswith(b"\x89PNG")


def test_gradients_need_no_zoo(digits, monkeypatch, capsys):
    shutil.copytree(digits.folder / "run", digits.folder / "moved" / "run")
    shutil.copy(digits.net, digits.folder / "moved")
    alone = type(digits)(folder=digits.folder / "moved")
    assert_refused(ask(alone, monkeypatch, capsys, "net.pth"), "name the zoo with --reference, or set")
    code, text, error = ask(alone, monkeypatch, capsys, "net.pth", "--method=gradient", "--format=json", "--output=4")
    assert (code, error) == (0, "")
    assert json.loads(text)["output"] == 4
    assert json.loads(text)["reference_score"] is None


def test_refusals(digits, monkeypatch, capsys, tmp_path):
    assert_refused(ask(digits, monkeypatch, capsys, "net.pth", "--output=10"), "found 10, expected 0 to 9")
    assert_refused(ask(digits, monkeypatch, capsys, "net.pth", "--figure=a.xyz"), "a.xyz, expected a file .png")
    for activation in ("relu", "tanh"):
        refused = ask(digits, monkeypatch, capsys, "net.pth", f"--activation={activation}")
        assert_refused(refused, f"--activation: found {activation}, expected sine as in the networks that run was")
    net = torch.load(digits.net)
    names = list(net)
    net[names[0]], net[names[2]] = torch.zeros(9, 2), torch.zeros(8, 9)
    net[names[1]] = torch.zeros(9)
    torch.save(net, tmp_path / "wide.pth")
    assert_refused(ask(digits, monkeypatch, capsys, str(tmp_path / "wide.pth")), "so that there is no reference")
