"""Commands as a user runs them, in this process."""

import sys

from scalegmn.cli import main


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
