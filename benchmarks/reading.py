"""Memory of reading a file of prompts of 10,000 and of 100,000 rows, the same few videos.

Each reading is a process of its own; the result is its largest resident set above that of a process that has
everything imported and has read a file of one hundred rows.

    python benchmarks/reading.py --json benchmarks/results/reading.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = (100, 10_000, 100_000)
WAYS = ("train", "check", "filter")
CHILD = """
import json, resource, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {src!r})
import torch
from vidsieve.training.data.prompts import FilePrompts, load_prompts
from vidsieve.training.data.checking import check_file
from vidsieve.training.data.filtering import _unusable
from vidsieve.training.data.rows import Remembered
from vidsieve.training.data.table import load_rows
from workbench.testbed.model import build_tokenizer
torch.set_num_threads(1)
path, way = Path(sys.argv[1]), sys.argv[2]
processor = SimpleNamespace(tokenizer=build_tokenizer())
start = time.perf_counter()
if way == "train":
    rows = load_prompts(processor, path)
    prompts = FilePrompts(None, processor, path, rows=rows)
    order = [prompts._row(prompts.choices, number, "")[0] for number in range(50)]
elif way == "check":
    check_file(path)
else:
    tokenizer = Remembered(processor.tokenizer)
    rows = load_rows(path, wanted=lambda row: _unusable(row, tokenizer), present=False)
    sum(len(row["question"]) for row in rows)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"peak": peak, "seconds": time.perf_counter() - start}}))
"""


def written(folder: Path, rows: int) -> Path:
    """Write a file in Video-R1's layout whose questions go round the scenes of a rendered one."""
    from vidsieve.testbed.files import write_scenes

    source = folder / "set" / "Video-R1-260k.json"
    if not source.exists():
        write_scenes(source.parent, world="dense", seed=5, scenes=8, layout="video-r1")
    records = [r for r in json.loads(source.read_text()) if r["data_type"] == "video"]
    path = source.with_name(f"rows-{rows}.json")
    with path.open("w") as file:
        for number in range(rows):
            record = records[number % len(records)] | {"problem_id": number, "process": "thinking " * 40}
            file.write(("[" if not number else ",\n") + json.dumps(record))
        file.write("]\n")
    return path


def measured(path: Path, way: str) -> dict[str, float]:
    """Return peak resident bytes and seconds of one reading."""
    code = CHILD.format(src=str(Path(__file__).resolve().parents[1] / "src"))
    done = subprocess.run([sys.executable, "-c", code, str(path), way], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, Any] = {"rows": ROWS, "ways": {}}
    with tempfile.TemporaryDirectory() as folder:
        paths = {rows: written(Path(folder), rows) for rows in ROWS}
        result["file_bytes"] = {rows: path.stat().st_size for rows, path in paths.items()}
        for way in WAYS:
            runs = {rows: [measured(path, way) for _ in range(options.repeats)] for rows, path in paths.items()}
            least = min(run["peak"] for run in runs[ROWS[0]])
            result["ways"][way] = {
                rows: {
                    "megabytes_above_base": [round((run["peak"] - least) / 1e6, 1) for run in found],
                    "seconds": [round(run["seconds"], 2) for run in found],
                }
                for rows, found in runs.items()
            }
            print(way, json.dumps(result["ways"][way]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
