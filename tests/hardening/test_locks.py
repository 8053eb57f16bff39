"""What a run writes is locked: one process at a time, whatever its path and file system."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

from vidsieve.errors import EvaluationError, OutputError, VidsieveError
from vidsieve.io.files import locked
from vidsieve.io.journal import LONGEST_LINE, Journal, Store
from vidsieve.training.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from vidsieve.io.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A file that another process has locked, and that process."""
    path = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield path, other
        other.kill()


def test_a_second_process_is_refused_by_name_and_a_killed_one_holds_nothing(held, tmp_path):
    path, other = held
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    (tmp_path / "file").symlink_to(path)
    for other_path in (path, link / path.name, tmp_path / "file"):
        with (
            pytest.raises(OutputError, match=rf"is writing {other_path} \(process {other.pid} on .+\): wait"),
            locked(other_path),
        ):
            pass
    other.kill()
    other.wait()
    with locked(path):
        assert list(path.parent.iterdir())
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_flock_a_file_is_the_lock(tmp_path, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "run.jsonl"
    with locked(path), pytest.raises(OutputError, match=rf"\(process {os.getpid()} on "), locked(path):
        pass
    assert not list(tmp_path.iterdir())
    gone = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(path), str(code)], check=False)
    assert gone.returncode == -9 and list(tmp_path.iterdir())
    with locked(path):
        pass
    assert not list(tmp_path.iterdir())


KILLED = """
import fcntl, os, signal, sys
from pathlib import Path
from vidsieve.io.files import locked
def flock(*_):
    raise OSError(int(sys.argv[2]), "none")
fcntl.flock = flock
with locked(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_of_a_process_on_another_machine_the_error_says_what_to_remove(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    (tmp_path / ".run.jsonl.softlock").write_text("7\nelsewhere\n")
    with (
        pytest.raises(OutputError, match=r"\(process 7 on elsewhere; if it is gone, remove .*run\.jsonl\.softlock\)"),
        locked(tmp_path / "run.jsonl"),
    ):
        pass


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".folder.lock").mkdir()
    (tmp_path / ".link.lock").symlink_to(victim)
    (tmp_path / ".hard.lock").hardlink_to(victim)
    os.mkfifo(tmp_path / ".pipe.lock")
    for path in (*(tmp_path / name for name in ("folder", "link", "hard", "pipe")), "/proc/nowhere/run.jsonl"):
        with pytest.raises(OutputError, match=f"cannot write {path}"), locked(path):
            pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("eval testbed --out run", "run/units-1-of-1.jsonl"),
        ("eval questions rows.jsonl --model testbed --out run", "run/units-1-of-1.jsonl"),
        ("data filter rows.jsonl kept.jsonl --model testbed", "kept.blind/units-1-of-1.jsonl"),
        ("train score run --data rows.jsonl --model testbed", "run/metrics.jsonl"),
        ("data annotate rows.jsonl out.jsonl --base-url http://127.0.0.1:1/v1 --model m", "out.journal.jsonl"),
        ("batch rows.jsonl out.jsonl --model testbed", "out.journal.jsonl"),
        ("testbed render run", "run"),
        ("report run page.html", "page.html"),
    ],
)
def test_a_second_command_is_refused_before_it_does_anything(tmp_path, run, monkeypatch, command, output):
    (tmp_path / "rows.jsonl").write_text('{"video": "a.mp4", "question": "what ?", "caption": "c"}\n')
    (tmp_path / output).parent.mkdir(exist_ok=True)
    monkeypatch.setattr("vidsieve.loading.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    hold = [sys.executable, "-c", HOLD, str(tmp_path / output)]
    with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        said, error = run(*command.split(), code=2, cwd=tmp_path)
        other.kill()
    assert not said and error.startswith(f"error: another process is writing {output} (process {other.pid} on ")


def test_a_journal_that_is_refused_is_not_touched(held):
    path, _ = held
    path.write_bytes(b'{"row": 1}\n{"ro')
    with pytest.raises(EvaluationError, match="another process is writing"), Journal(path):
        pass
    assert path.read_bytes() == b'{"row": 1}\n{"ro'


def test_a_folder_with_a_training_run_takes_no_evaluation(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(OutputError, match=rf"{tmp_path} holds a training run: name another folder"):
        Store(tmp_path, {})


@pytest.mark.parametrize("plant", ["link", "pipe", "folder", "text"])
def test_what_is_not_of_a_run_is_neither_written_nor_emptied(tmp_path, plant):
    precious = tmp_path / "precious"
    precious.write_text("ssh-rsa AAA")
    for name, begin in (
        ("metrics.jsonl", lambda folder: RunFolder(folder).begin(False)),
        ("units-1-of-1.jsonl", lambda folder: Journal(folder / "units-1-of-1.jsonl").__enter__()),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        path = folder / name
        {
            "link": lambda path=path: path.symlink_to(precious),
            "pipe": lambda path=path: os.mkfifo(path),
            "folder": path.mkdir,
            "text": lambda path=path: path.write_text("my figures"),
        }[plant]()
        with pytest.raises(VidsieveError, match=r"is a link or no file|is not a journal of this command"):
            begin(folder)
        assert plant != "text" or path.read_text() == "my figures"
    assert precious.read_text() == "ssh-rsa AAA"


def test_results_without_their_settings_are_not_taken_for_another_run(tmp_path):
    with Store(tmp_path, {"seed": 1}) as store:
        store.add("a", {"right": 1})
    (tmp_path / "run.json").unlink()
    with pytest.raises(EvaluationError, match=r"but not its run\.json"):
        Store(tmp_path, {"seed": 2})


def test_a_journal_of_gigabytes_is_not_read_whole(tmp_path):
    path = tmp_path / "units-1-of-1.jsonl"
    with Journal(path) as journal:
        journal.add({"unit": "a"})
    line = path.read_bytes()
    path.write_bytes(line + b'{"')
    os.truncate(path, 2**31)  # zeros without an end
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Journal(path):
        assert path.read_bytes() == line
    path.write_bytes(line + b"x" * (LONGEST_LINE + 1) + b"\n")
    with pytest.raises(EvaluationError, match=r"line 2 of .* is damaged"):
        Journal(path).load(lambda entry, place: None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**19  # KiB
