"""SIGKILL at random moments inside every command that can be resumed: the files at the end are those of a straight run.

Each command runs once to its end. Then it is started again and again in another folder and killed a random time after
its work has begun, up to as long as all of the work took, until it has been killed so often; where it comes to its end
before, the files are compared and the next folder begins. Files are compared byte by byte, without figures of the
clock, which `Case.read` leaves out.

    python benchmarks/kill_nine.py --kills 20
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsieve.io.machine import machine, write_result
from vidsieve.io.tensors import checksum, load_tensors
from vidsieve.testbed.files import write_scenes

CLOCK = frozenset({"minutes", "prompts_per_second", "rollouts_per_second"})
"""Figures of the clock, in metrics, checkpoints and training records."""
TEACHER = Path(__file__).resolve().parents[1] / "tests" / "data" / "teacher_server.py"


def without(value: Any, names: frozenset[str]) -> Any:
    """Return plain values without some keys of mappings, at any depth."""
    if isinstance(value, dict):
        return {key: without(inner, names) for key, inner in value.items() if key not in names}
    return [without(inner, names) for inner in value] if isinstance(value, list) else value


def values(path: Path, names: frozenset[str]) -> Any:
    """Return what a file of JSON, or of JSON lines, holds besides some keys."""
    text = path.read_text("utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [without(json.loads(line), names) for line in lines]


def state(path: Path) -> Any:
    """Return the header of a checkpoint but for the clock, and a checksum of its tensors."""
    header, tensors, _ = load_tensors(path)
    return without(header, CLOCK), checksum(tensors, {})


Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A command, the file that grows while it works, and how each file that it leaves is compared; None: not."""

    arguments: list[str]
    grows: str
    resume: str
    read: dict[str, Read | None]

    def command(self, folder: Path) -> list[str]:
        """Return the command line that begins or resumes a run in a folder."""
        again = [self.resume] if self.resume and (folder / self.grows).exists() else []
        return [sys.executable, "-m", "vidsieve", *self.arguments, *again]


def clockless(path: Path) -> Any:
    return values(path, CLOCK)


def policy_config(path: Path) -> Any:
    return values(path, CLOCK | {"checksum"})


TRAINED: dict[str, Read | None] = {
    "run/checkpoint.safetensors": state,
    "run/checkpoint.previous.safetensors": state,
    "run/metrics.jsonl": clockless,
    "run/policy/config.json": policy_config,
    "run/policy/model.safetensors": Path.read_bytes,
    "run/best/config.json": policy_config,
    "run/best/model.safetensors": Path.read_bytes,
}


def cases(data: Path, port: int) -> dict[str, Case]:
    train = ["--prompts-per-step", "2", "--save-every", "2", "--log-every", "1", "--eval-every", "4", "--threads", "1"]
    train += ["--set", "eval_prompts=2"]
    measured = ["--questions", "144", "--methods", "divprune", "--retention", "0.25", "--threads", "1"]
    teacher = ["--base-url", f"http://127.0.0.1:{port}/v1", "--frames", "2", "--concurrency", "4"]
    questions = str(data / "questions.jsonl")
    return {
        "train cacovid": Case(
            ["train", "cacovid", "run", "--steps", "16", *train], "run/metrics.jsonl", "--resume", TRAINED
        ),
        "train score": Case(
            ["train", "score", "run", "--steps", "10", *train], "run/metrics.jsonl", "--resume", TRAINED
        ),
        "eval testbed": Case(
            ["eval", "testbed", "--out", "run", *measured],
            "run/units-1-of-1.jsonl",
            "",
            {
                "run/run.json": Path.read_bytes,
                "run/result.json": Path.read_bytes,
                "run/samples.jsonl": Path.read_bytes,
                "run/timing.json": None,
                "run/units-1-of-1.jsonl": lambda path: values(path, frozenset({"select_ms", "crc"})),
            },
        ),
        "batch": Case(
            [
                "batch",
                str(data / "batch.jsonl"),
                "out.jsonl",
                "--model",
                "testbed",
                "--batch",
                "2",
                "--max-new-tokens",
                "8",
                "--threads",
                "1",
            ],
            "out.journal.jsonl",
            "",
            {name: Path.read_bytes for name in ("out.jsonl", "out.failed.jsonl", "out.journal.jsonl")},
        ),
        "data filter": Case(
            ["data", "filter", questions, "out.jsonl", "--model", "testbed", "--seeds", "24", "--threads", "1"],
            "out.blind/units-1-of-1.jsonl",
            "",
            {
                "out.jsonl": Path.read_bytes,
                "out.dropped.jsonl": Path.read_bytes,
                "out.blind/run.json": Path.read_bytes,
                "out.blind/units-1-of-1.jsonl": Path.read_bytes,
            },
        ),
        "data annotate": Case(
            ["data", "annotate", str(data / "captions.jsonl"), "out.jsonl", "--model", "tiny-teacher", *teacher],
            "out.journal.jsonl",
            "",
            {
                "out.jsonl": Path.read_bytes,
                "out.aside.jsonl": Path.read_bytes,
                "out.journal.jsonl": None,  # what was asked and paid for, in the order of the answers
            },
        ),
    }


def write_data(folder: Path) -> None:
    """Write scenes with questions, a file of questions for `batch`, of which three fail, and captions."""
    write_scenes(folder, world="dense", seed=3, scenes=24)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text("utf-8").splitlines()]
    asked = [row for row in rows if "question" in row][:120]
    for number in (5, 40, 77):
        asked[number] = asked[number] | {"video": "missing.mp4"}
    shown = [{"video": row["video"], "caption": f"row {number}"} for number, row in enumerate(rows[:160])]
    for name, lines in (("batch.jsonl", asked), ("captions.jsonl", shown)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def begin(case: Case, folder: Path) -> subprocess.Popen[bytes]:
    """Start a command, and return it once its file has grown, or it has ended."""
    folder.mkdir(exist_ok=True)
    path = folder / case.grows
    before = path.stat().st_size if path.exists() else 0
    run = subprocess.Popen(case.command(folder), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while run.poll() is None:
        now = path.stat().st_size if path.exists() else 0
        if now != before and now:
            break
        time.sleep(0.002)
    return run


def end(run: subprocess.Popen[bytes], folder: Path) -> None:
    _, err = run.communicate()
    if run.returncode not in (0, 1):  # 1: some rows of a batch failed, as they should
        raise SystemExit(f"{folder} ended with {run.returncode}:\n{err.decode()[-3000:]}")


def compare(case: Case, folder: Path, straight: Path) -> list[str]:
    """Return which files differ from those of the straight run, and which should not be there."""
    found = []
    for name, read in case.read.items():
        if read is not None and read(folder / name) != read(straight / name):
            found.append(name)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    halves = {name for name in names if name.endswith(".part")}
    return found + sorted(names - halves - case.read.keys())


def killed(case: Case, folder: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill a command `kills` times, and compare what it leaves at each end with a straight run."""
    run = begin(case, folder / "straight")
    begun = time.perf_counter()
    end(run, folder / "straight")
    seconds = time.perf_counter() - begun
    moments: list[float] = []
    differences: list[str] = []
    runs, left, place = 0, 0, folder / "0"
    while len(moments) < kills or place.exists():
        run = begin(case, place)
        wait = draw.uniform(0, seconds) if len(moments) < kills else None
        try:
            run.wait(wait)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
            moments.append(round(wait or 0.0, 3))
            continue
        end(run, place)
        runs, left = runs + 1, left + len(list(place.rglob(".*.part")))
        differences += compare(case, place, folder / "straight")
        place = folder / str(runs)
        print(f"{case.arguments[:2]}: {len(moments)} kills, {runs} ends, different: {differences}", flush=True)
    return {
        "kills": len(moments),
        "seconds_of_work": round(seconds, 2),
        "killed_after_seconds": moments,
        "ends": runs,
        "different_files": differences,
        "half_written_files_left": left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--only", default="", help="commands whose name has this; the others' results stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kill_nine.json"))
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as free:
        folder, port = Path(name).resolve(), free.getsockname()[1]
        free.close()
        (folder / "data").mkdir()
        write_data(folder / "data")
        log = ["--log", str(folder / "log"), "--slow", "0.05", "--lie", "0.1"]
        with subprocess.Popen([sys.executable, str(TEACHER), str(port), *log], stdout=subprocess.DEVNULL) as teacher:
            runs = json.loads(options.json.read_text("utf-8"))["runs"] if options.json.exists() else {}
            for case_name, case in cases(folder / "data", port).items():
                if options.only in case_name:
                    (folder / case_name).mkdir()
                    runs[case_name] = killed(case, folder / case_name, options.kills, draw)
                    minutes = round((time.perf_counter() - begun) / 60, 1)
                    write_result(
                        options.json, {"machine": machine(), "seed": options.seed, "minutes": minutes, "runs": runs}
                    )
            teacher.kill()
    for case_name, run in runs.items():
        print(case_name, {key: value for key, value in run.items() if key != "killed_after_seconds"})
    sys.exit(any(run["different_files"] for run in runs.values()))


if __name__ == "__main__":
    main()
