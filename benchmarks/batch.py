"""`vidsieve batch` on 500 clips of which 10 are broken: killed -9 and resumed, on Ray, and its memory for many rows.

Each run is the command in a process of its own, on the testbed's model. A straight run here is compared, byte by byte,
with one here that was killed three times, one on Ray, and one on Ray that was killed once and finished here. Peak
memory (of the command's process) is that of 1,000 rows and of 20,000 which name the same few clips.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from vidsieve.io.machine import machine, write_result
from vidsieve.serving.batch import side_files
from vidsieve.testbed.files import write_scenes

OPTIONS = ["--device", "cpu", "--threads", "1", "--batch", "4", "--frames", "8", "--max-new-tokens", "3"]
MANY = ["--device", "cpu", "--threads", "1", "--batch", "16", "--frames", "2", "--max-new-tokens", "1"]
SHARED = 4


def command(source: Path, target: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "vidsieve", "batch", str(source), str(target), "--model", "testbed", *options]


def settled(target: Path) -> int:
    """Return the number of rows in the journal of an unfinished run."""
    _, journal = side_files(target)
    if not journal.exists():
        return 0
    return sum(len(json.loads(line)["rows"]) for line in journal.read_bytes().split(b"\n")[1:-1])


def finish(source: Path, target: Path, *options: str) -> dict[str, Any]:
    """Run to the end; return numbers of rows, the seconds and the peak memory in MB."""
    before, begun = settled(target), time.perf_counter()
    process = subprocess.Popen(command(source, target, *options), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):  # 1: some rows failed
        raise SystemExit(f"{target.name} failed")
    journal = json.loads(side_files(target)[1].read_text())
    rows = {"rows": journal["settings"]["rows"], **journal["finished"], "before": before}
    return rows | {"seconds": round(time.perf_counter() - begun, 1), "peak_mb": round(used.ru_maxrss / 1024, 1)}


def kill(source: Path, target: Path, rows: int, wait: float, *options: str) -> dict[str, int]:
    """Run until `rows` rows are done, wait, kill -9, and return the numbers of rows before and after."""
    before = settled(target)
    process = subprocess.Popen(command(source, target, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and settled(target) < rows:
        time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    process.wait()
    if target.exists():
        raise SystemExit(f"{target.name} was finished before it was killed")
    return {"rows_before": before, "rows_after": settled(target)}


def outputs(target: Path) -> tuple[bytes, bytes]:
    return target.read_bytes(), side_files(target)[0].read_bytes()


def counted(target: Path) -> dict[str, Any]:
    """Return how many rows the outputs hold, of how many numbers, and whether they are in order."""
    answers, failed = ([json.loads(line) for line in text.splitlines()] for text in outputs(target))
    times = Counter(row["id"] for row in answers + failed)
    return {
        "answers": len(answers),
        "reasons": len(failed),
        "doubled": sum(count > 1 for count in times.values()),
        "different": len(times),
        "in_order": all([row["id"] for row in rows] == sorted(row["id"] for row in rows) for rows in (answers, failed)),
    }


def questions(folder: Path, clips: int, broken: int) -> Path:
    """Write clips, some of them broken, and one question on each."""
    write_scenes(folder, world="dense", seed=11, scenes=clips, broken=broken / clips)
    first: dict[str, str] = {}
    for line in (folder / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "question" in row:
            first.setdefault(row["video"], row["question"])
    rows = [{"id": n, "video": video, "question": text} for n, (video, text) in enumerate(sorted(first.items()))]
    return _write(folder / "in.jsonl", rows)


def many(source: Path, count: int) -> Path:
    """Write a file of so many rows that name the first whole clips, many rows in a row each."""
    broken = json.loads((source.parent / "truth.json").read_text())["broken"]
    rows = [row for line in source.read_text().splitlines() if (row := json.loads(line))["video"] not in broken]
    each = count // SHARED
    return _write(source.parent / f"{count}.jsonl", [rows[n // each] | {"id": n} for n in range(each * SHARED)])


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--broken", type=int, default=10)
    parser.add_argument("--rows", default="1000,20000", help="of the two files whose memory is compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/batch.json"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    draw, ray = random.Random(options.seed), [*OPTIONS, "--ray", "1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = questions(folder / "clips", options.clips, options.broken)
        targets = {kind: folder / f"{kind}.jsonl" for kind in ("straight", "killed", "ray", "both")}
        runs = {"straight": finish(source, targets["straight"], *OPTIONS)}
        moments = sorted(draw.sample(range(options.clips // 10, options.clips * 9 // 10), 3))
        kills = [kill(source, targets["killed"], rows, draw.uniform(0, 0.3), *OPTIONS) for rows in moments]
        runs["killed"] = finish(source, targets["killed"], *OPTIONS) | {"kills": kills}
        runs["ray"] = finish(source, targets["ray"], *ray)
        kills = [kill(source, targets["both"], options.clips // 3, draw.uniform(0, 0.3), *ray)]
        runs["both"] = finish(source, targets["both"], *OPTIONS) | {"kills": kills}
        for kind, target in targets.items():
            same = outputs(target) == outputs(targets["straight"])
            runs[kind] |= counted(target) | {"equals_straight": same}
            print(kind, runs[kind], flush=True)
        memory = []
        for count in map(int, options.rows.split(",")):
            file = many(source, count)
            memory.append(finish(file, folder / f"many-{count}.jsonl", *MANY))
            print(memory[-1], flush=True)
    result = {
        "machine": machine(),
        "seed": options.seed,
        "clips": options.clips,
        "broken": options.broken,
        "options": " ".join(OPTIONS),
        "runs": runs,
        "memory": {"options": " ".join(MANY), "runs": memory},
    }
    write_result(options.json, result)


if __name__ == "__main__":
    main()
