"""The same questions through lmms-eval and through `vidsieve eval`: sample by sample the same texts, and one accuracy.

Scenes of the testbed are written as mp4 files. `vidsieve eval questions` answers the questions about them, and so does
lmms-eval's own command, once for each condition and offline: it runs the task in tests/lmms, which judges answers by
itself, with the plug-in that it finds by entry point. Exit code 1 where a text, a count of tokens, a score or an
accuracy differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vidsieve import registry
from vidsieve.evaluation.items import Item
from vidsieve.io.machine import machine, write_result
from vidsieve.testbed.files import write_scenes
from vidsieve.testbed.world import FRAMES

TASK = "vidsieve_testbed"
CONDITIONS = {
    ("full", "1"): "",
    ("cacovid", "0.1"): ",retention=0.1",
    ("score", "0.25"): ",retention=0.25",
    ("divprune", "0.25"): ",retention=0.25",
    ("fastv", "0.25"): ",retention=0.25,earliest=true",
}
"""By method and retention, as `vidsieve eval` names them, what the plug-in is told beside the method."""
INCLUDED = Path(__file__).parents[1] / "tests" / "lmms"


def run(command: list[str], folder: Path, threads: int) -> tuple[str, float]:
    """Return what a module of this environment says, and the seconds it takes."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    settings = os.environ | offline | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=settings, capture_output=True, text=True)
    said = f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {said}")
    return said, time.perf_counter() - start


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ours(folder: Path, threads: int) -> tuple[dict[Any, dict[str, Any]], dict[Any, float], float]:
    """Return what `vidsieve eval` has: samples by condition and question, accuracies by condition, and the seconds."""
    methods = ",".join(method for method, _ in CONDITIONS if method != "full")
    command = ["vidsieve", "eval", "questions", "questions.jsonl", "--model", "testbed", "--methods", methods]
    command += ["--retention", "0.25,0.1", "--frames", str(FRAMES), "--earliest", "--device", "cpu", "--out", "ours"]
    _, seconds = run(command, folder, threads)
    samples: dict[Any, dict[str, Any]] = {}
    for line in lines_of(folder / "ours" / "samples.jsonl"):
        method, _, _, _, retention, _ = line["condition"].split("/")
        samples.setdefault((method, retention), {})[line["item"]] = line
    rows = json.loads((folder / "ours" / "result.json").read_text(encoding="utf-8"))["rows"]
    return samples, {(row["method"], row["retention"]): row["accuracy"] for row in rows}, seconds


def theirs(folder: Path, method: str, more: str, threads: int) -> tuple[Any, dict[int, dict[str, Any]], float]:
    """Return lmms-eval's results under one condition, samples by document, and the seconds."""
    out = folder / f"lmms-{method}"
    command = ["lmms_eval", "eval", "--model", "vidsieve", "--tasks", TASK, "--include_path", str(INCLUDED)]
    command += ["--model_args", f"pretrained=testbed,method={method},frames={FRAMES},device=cpu{more}"]
    said, seconds = run([*command, "--output_path", str(out), "--log_samples"], folder, threads)
    results, samples = list(out.glob("**/*_results.json")), list(out.glob(f"**/*_samples_{TASK}.jsonl"))
    if len(results) != 1 or len(samples) != 1:  # an evaluation that fails exits with 0
        raise SystemExit(f"lmms-eval wrote no results: {said}")
    by = {line["doc_id"]: line for line in lines_of(samples[0])}
    return json.loads(results[0].read_text(encoding="utf-8")), by, seconds


def compared(items: list[Item], mine: dict[str, Any], by: dict[int, dict[str, Any]]) -> dict[str, int]:
    """Return how many questions both have, and of how many text, tokens and score are the same."""
    found = {"samples": len(mine), "samples_of_lmms_eval": len(by), "texts": 0, "tokens": 0, "scores": 0}
    for number, item in enumerate(items):
        line, sample = by[number], mine[item.id]
        if (line["input"], line["target"]) != (item.question, item.answer):
            raise SystemExit(f"lmms-eval's document {number} is not question {item.id}")
        (counts,) = line["token_counts"]
        read = counts["video_tokens_kept"], counts["prompt_tokens_before"], counts["input_tokens"]
        found["texts"] += line["filtered_resps"] == sample["said"]
        found["tokens"] += read == (sample["kept"], *sample["prompt"])
        found["scores"] += line["accuracy"] == sample["score"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=12, help="about 20 questions each")
    parser.add_argument("--seed", type=int, default=4242)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/lmms.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scenes(folder, world="dense", seed=options.seed, scenes=options.scenes)
        items = registry.benchmarks.get("questions").read(folder / "questions.jsonl")
        samples, accuracies, spent = ours(folder, options.threads)
        print(f"vidsieve eval: {len(items)} questions, {len(samples)} conditions, {spent:.0f} s", flush=True)
        for (method, retention), more in CONDITIONS.items():
            results, by, seconds = theirs(folder, method, more, options.threads)
            found = compared(items, samples[method, retention], by)
            one, other = accuracies[method, retention], results["results"][TASK]["accuracy,none"]
            rows.append(
                {
                    "method": method,
                    "retention": retention,
                    "equal": found,
                    "accuracy": one,
                    "accuracy_of_lmms_eval": other,
                    "real_retention": results["throughput"]["avg_retention"],
                    "same": set(found.values()) == {len(items)} and abs(one - other) < 1e-9,
                    "seconds_of_lmms_eval": round(seconds, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    packages = ("lmms_eval", "datasets", "av", "numpy", "accelerate")
    result = {
        "what": f"{len(items)} questions about {options.scenes} scenes of the testbed's world A (seed {options.seed})",
        "machine": machine(),
        "versions": {name: version(name) for name in packages},
        "questions": len(items),
        "conditions": rows,
        "same": all(row["same"] for row in rows),
        "seconds_of_vidsieve_eval": {"all": round(spent, 1), "conditions": len(samples)},
    }
    write_result(options.json, result)
    if not result["same"]:
        raise SystemExit("lmms-eval and vidsieve differ: see the lines above")


if __name__ == "__main__":
    main()
