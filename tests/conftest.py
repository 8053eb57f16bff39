"""Shared set-up: few threads, no network, and a last word on what was not exercised."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:  # one thread for each, and for the programs they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("vidsieve", deadline=None)  # a loaded machine is no fault
hypothesis.settings.load_profile("vidsieve")
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def testbed():
    """The shipped tiny model and its processor."""
    from vidsieve.loading import load_model

    return load_model("testbed")


@pytest.fixture(scope="session")
def shallow():
    """The tiny model whose first layer sees the video."""
    from vidsieve.loading import load_model

    return load_model("testbed:shallow")


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal; jobs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; return what it printed to stdout and stderr, blanks made one.

    `run("workbench", …)` is `python -m workbench …`.
    """
    from vidsieve.cli.main import main
    from vidsieve.io import faults
    from workbench import __main__ as workbench

    def run(*arguments, code=0, cwd=None):
        threads = torch.get_num_threads()
        with monkeypatch.context() as patch:
            own = "workbench" in arguments[:2]
            patch.setattr("sys.argv", ["vidsieve", *(str(word) for word in arguments if word != "workbench")])
            patch.setattr(faults, "seen", False)
            patch.setattr(faults, "debug", False)
            if cwd is not None:
                patch.chdir(cwd)
            ended = 0
            try:
                main(*([workbench.app] if own else []))
            except SystemExit as end:
                ended = end.code or 0
        torch.set_num_threads(threads)
        out, err = capsys.readouterr()
        assert ended == code, out + err
        return " ".join(out.split()), " ".join(err.split())

    return run


@pytest.fixture
def cli(run):
    """Run a command in this process and return all that it printed; `fails`: it ends with an error."""
    return lambda *arguments, fails=False: " ".join(run(*arguments, code=2 if fails else 0)).strip()


@pytest.fixture(autouse=True)
def _families_are_there(request):
    """Skip a test whose parameters or marker name a model family that the installed transformers cannot run."""
    from workbench.families import absent

    marker, calls = request.node.get_closest_marker("families"), getattr(request.node, "callspec", None)
    names = [*(marker.args if marker else ()), *(calls.params.values() if calls else ())]
    for reason in filter(None, (absent(name) for name in names if isinstance(name, str))):
        pytest.skip(reason)


@pytest.fixture
def topv(monkeypatch):
    """TopV, of the workbench, among the methods."""
    from vidsieve import registry

    registry.compressors.names()
    monkeypatch.setitem(registry.compressors._table, "topv", "workbench.topv:TopV")


def pytest_addoption(parser):
    parser.addoption("--oracles", type=Path, metavar="DIR", help="recorded cases to compare with, of tests/oracles")


def pytest_collection_modifyitems(items):
    """Put files with slow tests first: with one file at a time for each process, none of them is left for the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_report_header():
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    gone = [item for item in ("gpu", "network") if item not in terminalreporter.config.option.markexpr]
    source = "" if "VIDSIEVE_VLLM_SOURCE" in os.environ else "vLLM's sources (VIDSIEVE_VLLM_SOURCE), "
    terminalreporter.write_line("")
    terminalreporter.write_line(
        f"not exercised here: {', '.join(gone)} (no such tests yet in this project), vLLM (make test-vllm), {source}"
        "lmms-eval (make test-lmms)"
        f"{f'; {len(skipped)} skipped, reasons above' if skipped else ''}"
    )
