"""What sweeps and comparisons start."""

import pytest

from scalegmn.experiments.processes import program
from scalegmn.experiments.sweep import SweepConfig


def test_a_script_is_its_file_or_the_command_of_its_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script in ("inr_classification.py", "classification"):
        assert program(script) == ["-m", "scalegmn", "train", "classification"]
    assert program("predicting_generalization.py")[-1] == "generalization"
    (tmp_path / "inr_classification.py").touch()
    assert program("inr_classification.py") == ["inr_classification.py"]
    with pytest.raises(ValueError, match=r"script: none.py: no such file, and no task; tasks are classification, "):
        program("none.py")


def test_trials_import_what_the_sweep_imports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = SweepConfig(base=("a.yml",), parameters={"batch_size": [1, 2]}, imports=("my_things",))
    assert sweep.command({"batch_size": 2}) == [
        *("-m", "scalegmn", "train", "classification", "--import=my_things", "--conf=a.yml", "--batch_size=2")
    ]
