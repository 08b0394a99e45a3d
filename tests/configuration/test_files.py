"""Where configuration files are found."""

from pathlib import Path

import pytest

from scalegmn import build_model
from scalegmn.configuration.files import find_config, shipped_configs
from scalegmn.networks import NetSpec

ROOT = Path(__file__).parents[2]


def test_shipped_configurations_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_configs() == ROOT / "configs"
    for name in (
        "digits_cls/scalegmn.yml",
        "configs/digits_cls/scalegmn.yml",
        ROOT / "configs/digits_cls/scalegmn.yml",
    ):
        assert find_config(name) == ROOT / "configs/digits_cls/scalegmn.yml"
    model = build_model("digits_cls/scalegmn.yml", spec=NetSpec.mlp([2, 3, 1], "sine"))
    assert model.spec == NetSpec.mlp([2, 3, 1], "sine")


def test_the_current_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_cls").mkdir()
    (tmp_path / "digits_cls/scalegmn.yml").write_text("batch_size: 1\n")
    assert find_config("digits_cls/scalegmn.yml") == Path("digits_cls/scalegmn.yml")
    assert find_config("configs/digits_cls/scalegmn.yml") == ROOT / "configs/digits_cls/scalegmn.yml"


def test_a_missing_file_is_named_with_the_places_and_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no such file; did you mean digits_cls/scalegmn\.yml") as caught:
        find_config("digits_cls/scalegm.yml")
    assert str(tmp_path) in str(caught.value)
    assert str(ROOT / "configs") in str(caught.value)
    with pytest.raises(ValueError, match=r"no such file; did you mean configs/digits_cls/scalegmn\.yml"):
        find_config("configs/digits_cls/scalegm.yml")
    with pytest.raises(ValueError, match="no such file"):
        find_config(tmp_path / "digits_cls/scalegmn.yml")
