"""A small zoo of digit INRs and a run on it, trained once."""

from types import SimpleNamespace

import pytest
from commands import run_here

from scalegmn.explore.content import of_run


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """`folder`, with `zoo` (digit INRs), `run` and `net`, network 7 as a file; made in seconds."""
    folder = tmp_path_factory.mktemp("digits")
    zoo = "zoo inr --out=zoo --images=digits --num_images=240 --views=2 --hidden=[8,8] --w0=6 --lr=1e-2 --steps=100"
    (folder / "run.yml").write_text(
        "data: {dataset_path: zoo}\nbatch_size: 32\nscalegmn_args: {hidden_dim: 16, num_probes: 16, normalize: true}\n"
        "train_args: {num_epochs: 16}\n"
        "optimization: {optimizer_args: {lr: 3e-3}, scheduler_args: {warmup_steps: 20, decay: cosine}}\n"
    )
    for words in (
        zoo.split(),
        ["train", "classification", "--conf", "run.yml", "--run_dir=run"],
        ["zoo", "export", "zoo", "--network=7", "--out=net.pth"],
    ):
        done = run_here("-m", "scalegmn", *words, cwd=folder)
        assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, zoo=folder / "zoo", run=folder / "run", net=folder / "net.pth")


@pytest.fixture(scope="session")
def shown_run(digits):
    """The run as the page shows it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(digits.folder)
        return of_run(digits.run)
