"""`scalegmn zoo import`: files and a table become a zoo, as a user runs it."""

import json

import pytest
import torch
from commands import run_here
from safetensors.torch import save_file
from torch import nn

import scalegmn
from scalegmn.zoos.zoo_format import open_zoo


def classifier(width, generator=None):
    """A small CNN with batch norms where the width is odd."""
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 3))


def command(folder, *words):
    return run_here("-m", "scalegmn", "zoo", "import", *words, "--out", "zoo", cwd=folder)


def refused(folder, *words):
    result = command(folder, *words)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
    assert not (folder / "zoo").exists()
    return result.stderr


@pytest.fixture
def inrs(tmp_path):
    """Twelve INRs of four images of three classes, in two kinds of files."""
    torch.manual_seed(0)
    (tmp_path / "nets").mkdir()
    modules = {}
    lines = ["\ufeffname;label;group"]
    for number in range(12):
        module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        name = f"net_{number}.{'pth' if number % 2 else 'safetensors'}"
        path = tmp_path / "nets" / name
        torch.save(module.state_dict(), path) if number % 2 else save_file(module.state_dict(), path)
        modules[name] = module
        lines.append(
            f"{name if number % 3 else name.rpartition('.')[0]};{('ten', 'class 10', 'class 9')[number % 3]};"
            f"image {number % 4}"
        )
    (tmp_path / "labels.csv").write_text("\n".join([lines[0], *lines[:0:-1]]), encoding="utf-8")
    (tmp_path / "nets" / "readme.txt").write_text("")
    return tmp_path, modules


def test_inrs(inrs):
    """Networks, classes and groups are those of the table, in its order; it trains."""
    folder, modules = inrs
    result = command(
        folder, "nets", "--labels", "labels.csv", "--activation", "tanh", "--val_fraction=0.25", "--test_fraction=0.25"
    )
    assert result.returncode == 0, result.stderr
    assert "note: nets: not read: 1 .txt" in result.stderr
    assert "note: classes, from 0: class 9, class 10, ten" in result.stderr
    assert "zoo: 12 networks (6 train, 3 val, 3 test), MLP [2, 4, 4, 1] (tanh)" in result.stdout
    zoo = open_zoo(folder / "zoo")
    assert zoo.provenance["classes"] == ["class 9", "class 10", "ten"]
    for row, number in enumerate(reversed(range(12))):
        module = modules[f"net_{number}.{'pth' if number % 2 else 'safetensors'}"]
        expected = scalegmn.from_state_dict(module.state_dict(), "tanh")
        assert torch.equal(zoo.params[row : row + 1].flatten(), expected.flatten())
        assert zoo.columns["label"][row] == (2, 1, 0)[number % 3]
    groups = [set(zoo.columns["image"][rows].tolist()) for rows in zoo.splits.values()]
    assert sum(map(len, groups)) == 4
    trained = run_here(
        *("-m", "scalegmn", "train", "classification", "--conf", "digits_cls/scalegmn.yml", "--data.dataset_path=zoo"),
        *("--scalegmn_args.out_dim=3", "--train_args.num_epochs=1", "--run_dir=run", "--scalegmn_args.hidden_dim=8"),
        cwd=folder,
    )
    assert trained.returncode == 0, trained.stderr
    words = ("-m", "scalegmn", "predict", "--checkpoint=run", "nets/net_1.pth", "--format=json")
    (row,) = json.loads(run_here(*words, cwd=folder).stdout)
    assert row["class_name"] == zoo.classes[row["class"]]
    assert "already" in command(folder, "nets", "--labels", "labels.csv", "--activation", "tanh").stderr


def test_classifiers(tmp_path):
    """Several architectures, scores, splits and activations of the table; networks keep what belongs to them."""
    torch.manual_seed(0)
    modules, lines = [], ["split,name,score,activation"]
    for number, split in enumerate(["train", "Validation", "test"] * 3):
        module = classifier(2 + number % 2)
        torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / f"{number}.ckpt")
        modules.append(module)
        lines.append(f"{split},{number}.ckpt,{number / 10},{'relu' if number % 2 else 'tanh'}")
    (tmp_path / "scores.csv").write_text("\n".join(lines))
    (tmp_path / "extra.pt").write_bytes((tmp_path / "0.ckpt").read_bytes())
    result = command(tmp_path, ".", "--labels", "scores.csv")
    assert result.returncode == 0, result.stderr
    assert "1 network left out: not in scores.csv" in result.stderr
    assert "3.linear" not in result.stderr
    zoo = open_zoo(tmp_path / "zoo")
    assert sorted(str(params.spec) for params in zoo.nets) == ["CNN [1, 2, 3] (tanh)", "CNN [1, 3, 3] (relu)"]
    for split, first in (("train", 0), ("val", 1), ("test", 2)):
        scores = zoo.columns["test_accuracy"][zoo.splits[split]]
        assert sorted(round(10 * score) for score in scores.tolist()) == [first, first + 3, first + 6]
    flat = {
        round(10 * score): params
        for params, score in zip(
            [params[row : row + 1] for params in zoo.nets for row in range(len(params))],
            zoo.columns["test_accuracy"].tolist(),
            strict=True,
        )
    }
    for number, module in enumerate(modules):
        assert torch.equal(flat[number].weights[0][0], module[0].weight)
        assert torch.equal(flat[number].biases[1][0], module[3].bias)


def test_labels_may_be_written_as_decimals(inrs):
    """As pandas writes a column of whole numbers in which some are missing."""
    folder, _ = inrs
    (folder / "labels.csv").write_text("name,label\n" + "\n".join(f"net_{k},{k}.0" for k in range(12)))
    assert command(folder, "nets", "--labels", "labels.csv", "--activation", "tanh").returncode == 0
    zoo = open_zoo(folder / "zoo")
    assert (zoo.columns["label"].tolist(), zoo.classes) == ([*range(12)], None)


@pytest.mark.parametrize("header", ["name,label", "Name,LABEL", "\n\n name , label "])
@pytest.mark.parametrize("place", ["nets/", "./nets/", "", "nets\\", "{folder}/nets/"])
def test_forms_of_names(inrs, header, place):
    folder, _ = inrs
    lines = [
        f"{place.format(folder=folder)}net_{k},{'ca' if k % 2 else 'cafe'}{chr(0x301) * (k == 2)}" for k in (0, 1, 2)
    ]
    (folder / "labels.csv").write_text("\n".join([header, *lines]), encoding="utf-8")
    assert command(folder, "nets", "--labels", "labels.csv", "--activation", "tanh").returncode == 0
    zoo = open_zoo(folder / "zoo")
    assert (zoo.columns["label"].tolist(), zoo.classes) == ([1, 0, 2], ("ca", "cafe", "caf\u00e9"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,label\nnet_1,0\nnet_3,nan", "label is missing for net_3 (1 in all)"),
        ("name,label\nnet_1,0.25\nnet_3,1", "label: found 0.25, expected classes: whole numbers from 0, or names"),
        ('name,label\nnet_1,"a\nb"', "line 3: label has a line break or a control sign"),
        ("name,label\nnet_1,a\0", "not a CSV file (a table of a spreadsheet?); save it as CSV"),
        ("PK\x03\x04", "not a CSV file (a table of a spreadsheet?); save it as CSV"),
        ("label,net\n1,a", "found the columns label, net, expected name, label or score"),
        ("name,label\n", "no networks, expected a line for each"),
        ("name,label,label\nnet_1.pth,1,2", "found 2 columns label, expected one"),
        (f"name,label\n{'a' * 200_000},1", "not a CSV file (field larger than field limit"),
        ("name,label\nnet_1.pth", "line 2: found 1 cells, expected 2"),
        ("name,label\nnet_1.pth,", "label is missing for net_1.pth (1 in all)"),
        ("name,score\nnet_1.pth,93", "score of net_1.pth: found 93, expected 0 to 1"),
        ("name,label\nnet_99.pth,1", "labels.csv: net_99.pth: no file of the networks has this name"),
        ("name,label\nnet_1.pth,1\nnet_1,1", "net_1.pth stands in it more than once"),
        ("name,label,split\nnet_1.pth,1,dev", "split: found dev, expected train, training, val"),
        ("name,label,split,group\nnet_1,1,train,a\nnet_3,1,test,a", "group a is in the splits train and test"),
        ("name,label,activation\nnet_1,1,swoosh", "activation: found swoosh, expected one of"),
    ],
)
def test_bad_tables(inrs, table, message):
    folder, _ = inrs
    (folder / "labels.csv").write_text(table)
    assert message in refused(folder, "nets", "--labels", "labels.csv", "--activation=tanh")


def test_bad_networks(inrs):
    """Each problem is said once, with the first network that has it; nothing is written."""
    folder, modules = inrs
    words = ("nets", "--labels", "labels.csv", "--activation=tanh")
    for number in (1, 3, 5, 7, 9, 11):
        (folder / "nets" / f"net_{number}.pth").write_bytes(b"nothing")
    message = refused(folder, *words)
    assert message.count("refused") == message.count("net_") == 1
    assert "nets/net_11.pth: refused" in message
    assert "(as in 5 more)" in message
    for number in (1, 3, 5, 7, 9, 11):
        state = modules[f"net_{number}.pth"].state_dict()
        torch.save({**state, "4.weight": torch.zeros(1, 10 + number)}, folder / "nets" / f"net_{number}.pth")
    message = refused(folder, *words)
    assert [number for number in range(12) if f"net_{number}.pth" in message] == [3, 5, 7, 9, 11]
    assert message.endswith("; 1 more like these\n")


def test_frequencies_are_not_assumed_in_silence(inrs):
    folder, _ = inrs
    words = ("nets", "--labels", "labels.csv", "--activation=sine")
    assert "frequency of their sines: taken as 30; --w0 sets another" in command(folder, *words).stderr
    (folder / "zoo").rename(folder / "first")
    assert "frequency" not in command(folder, *words, "--w0=6").stderr
    assert open_zoo(folder / "zoo").spec.layers[0].w0 == 6


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("leaky_relu", "do not tell the slope of their leaky relus: taken as 0.01; name another as the activation"),
        ("gelu", "do not tell whether their gelus are exact: taken as exact; the activation 'gelu(tanh)' is the"),
        ("leaky_relu(0.2)", None),
        ("gelu(tanh)", None),
        ("tanh", None),
    ],
)
def test_parameters_of_activations_are_not_assumed_in_silence(inrs, name, note):
    folder, _ = inrs
    result = command(folder, "nets", "--labels", "labels.csv", f"--activation={name}")
    assert result.returncode == 0, result.stderr
    assert note in result.stderr if note else "do not tell" not in result.stderr
    assert open_zoo(folder / "zoo").spec.layers[0].activation == name


def test_options(inrs):
    folder, _ = inrs
    words = ("nets", "--labels", "labels.csv")
    assert refused(folder, *words).count("a state dict does not tell its activation; set --activation") == 1
    assert "--val_fraction, --test_fraction" in refused(folder, *words, "--val_fraction=0.9")
    assert "gone: no such file" in refused(folder, "nets", "--labels", "gone", "--activation=tanh")
