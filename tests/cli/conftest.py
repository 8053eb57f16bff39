"""The command line in this process: what it prints, and whether it ends as it should."""

from __future__ import annotations

import pytest

from vidsieve.cli.main import main


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a command and return what it printed, blanks made one; `fails`: it ends with an error on purpose."""

    def run(*arguments, fails=False):
        monkeypatch.setattr("sys.argv", ["vidsieve", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        assert code == (2 if fails else 0), printed.out + printed.err
        return " ".join((printed.out + printed.err).split())

    return run
