"""Commands as a user runs them, in this process, in a copy of one that has imported the package, or in a new one."""

import io
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from runpy import run_path

import pytest

from scalegmn.cli import main


def run_process(*words, cwd, **environment):
    """`python WORDS` in a folder, in a process of its own."""
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def execute(words):
    """What `python WORDS` does: `-m scalegmn WORDS`, `-c CODE WORDS` or a script."""
    if words[:2] == ["-m", "scalegmn"]:
        sys.argv = ["scalegmn", *words[2:]]
        main()
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        run_path(words[0], run_name="__main__")


def run_here(*words, cwd):
    """As `run_process`, in this process, which need not import everything again."""
    words, code, out, err = [str(word) for word in words], 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", sys.argv)
        try:
            execute(words)
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


FORKS = multiprocessing.get_context("forkserver")
"""Starts processes as copies of one that has imported what commands need, which takes seconds."""
FORKS.set_forkserver_preload(
    ["pytest", "matplotlib.figure", "jsonargparse", "lightning.fabric", "torch._dynamo"]
    + [f"scalegmn.cli.{name}" for name in ("train", "predict", "symmetry", "export", "zoo.inr", "zoo.cnn")]
)


class Fork:
    """`python WORDS` in a folder, in a process of its own that begins with everything imported.

    It is a copy of a process that did nothing but import: nothing is registered there, and nothing of it stays.
    `poll` and `send_signal` are those of `subprocess.Popen`.

    Args:
        words: `-m scalegmn WORDS`, `-c CODE WORDS` or a script.
        cwd: the folder; None: the current one.
        environment: variables besides those of this process.
    """

    def __init__(self, *words, cwd=None, **environment):
        self.folder = tempfile.TemporaryDirectory()
        files = [str(Path(self.folder.name) / name) for name in ("stdout", "stderr")]
        arguments = [str(word) for word in words], str(cwd or os.getcwd()), {**os.environ, **environment}, files
        self.process = FORKS.Process(target=_forked, args=arguments)
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def finish(self):
        """Waits for the end; a `subprocess.CompletedProcess`."""
        self.process.join(300)
        assert self.process.exitcode is not None, "the process does not end"
        out, err = ((Path(self.folder.name) / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess((), self.process.exitcode, out, err)


def _forked(words, cwd, environment, files):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    execute(words)


def run_fork(*words, cwd=None, **environment):
    """As `run_process`, in a `Fork`."""
    return Fork(*words, cwd=cwd, **environment).finish()


@contextmanager
def largest_file(size):
    """No file can grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_main(main, arguments, folder, monkeypatch, capsys):
    """Exit code, stdout and stderr of `main` with these command line words, in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def run_command(words, folder, monkeypatch, capsys):
    """Exit code, stdout and stderr of `scalegmn` with these words, in a folder."""
    return run_main(main, words, folder, monkeypatch, capsys)


def assert_refused(result, message):
    """Exit code 2, and one line with the message."""
    code, _, error = result
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
