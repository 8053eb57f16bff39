"""The same questions through lmms-eval and through `vidsieve eval`: sample by sample the same texts, and one accuracy.

Scenes of the testbed are written as mp4 files; lmms-eval's own command runs the task in tests/lmms with the plug-in
that it finds by entry point, once for each condition, offline; the examiner behind `vidsieve eval questions` answers
here. The task judges answers by itself. Exit code 1 where a text, a count of kept tokens, or an accuracy differs.
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
from vidsieve.adapters.pruning import adapter_for
from vidsieve.benchmarking import machine, write_result
from vidsieve.eval.items import Item
from vidsieve.eval.methods import method_for
from vidsieve.eval.runner import Condition, Examiner
from vidsieve.pipeline import load_model
from vidsieve.testbed.files import write_scenes
from vidsieve.testbed.world import FRAMES

TASK = "vidsieve_testbed"
CONDITIONS: tuple[tuple[str, float | None], ...] = (
    ("full", None),
    ("cacovid", 0.1),
    ("score", 0.25),
    ("divprune", 0.25),
)
INCLUDED = Path(__file__).parents[1] / "tests" / "lmms"


def ours(items: list[Item]) -> tuple[dict[tuple[str, float | None], list[dict[str, Any]]], float]:
    """Return what the examiner has of every condition, in the order of the questions, and the seconds it took."""
    model, processor = load_model("testbed")
    conditions = {}
    for name, retention in CONDITIONS:
        method = None if retention is None else method_for(name, "testbed", retention=retention)
        conditions[name, retention] = Condition(FRAMES, method)
    examiner = Examiner(adapter_for(model), processor, list(conditions.values()))
    start = time.perf_counter()
    samples: dict[tuple[str, str], dict[str, Any]] = {}
    for video in dict.fromkeys(item.video for item in items):
        record = examiner.measure([item for item in items if item.video == video])
        samples |= {(sample["condition"], sample["item"]): sample for sample in record["samples"]}
    seconds = time.perf_counter() - start
    found = {named: [samples[one.key, item.id] for item in items] for named, one in conditions.items()}
    return found, seconds


def theirs(folder: Path, out: Path, method: str, retention: float | None, threads: int) -> tuple[Any, list[Any], float]:
    """Return lmms-eval's results and samples of one condition, and the seconds that its command took."""
    amount = "" if retention is None else f",retention={retention}"
    arguments = f"pretrained=testbed,method={method}{amount},frames={FRAMES},device=cpu"
    command = [sys.executable, "-m", "lmms_eval", "eval", "--model", "vidsieve", "--model_args", arguments]
    command += ["--tasks", TASK, "--include_path", str(INCLUDED), "--output_path", str(out), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    start = time.perf_counter()
    run = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | offline | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    results, samples = list(out.glob("**/*_results.json")), list(out.glob(f"**/*_samples_{TASK}.jsonl"))
    if run.returncode or not results or not samples:  # an evaluation that fails exits with 0
        raise SystemExit(f"lmms-eval gave no results for {arguments}:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}")
    lines = [json.loads(line) for line in samples[0].read_text(encoding="utf-8").splitlines()]
    return json.loads(results[0].read_text(encoding="utf-8")), lines, seconds


def compared(items: list[Item], mine: list[dict[str, Any]], results: Any, lines: list[Any]) -> dict[str, Any]:
    """Return how many samples are the same, and both accuracies."""
    by = {line["doc_id"]: line for line in lines}
    texts = kept = scores = 0
    for number, (item, sample) in enumerate(zip(items, mine, strict=True)):
        line = by[number]
        if line["doc"]["question"] != item.question or not str(item.video).endswith(line["doc"]["video"]):
            raise SystemExit(f"lmms-eval's document {number} is not question {item.id}")
        (said,), (counts,) = line["filtered_resps"], line["token_counts"]
        texts += said == sample["said"]
        kept += (counts["video_tokens_kept"], counts["input_tokens"]) == (sample["kept"], sample["prompt"][1])
        scores += line["accuracy"] == sample["score"]
    return {
        "samples": len(items),
        "samples_of_lmms_eval": len(lines),
        "equal_texts": texts,
        "equal_counts": kept,
        "equal_scores": scores,
        "accuracy": sum(sample["score"] for sample in mine) / len(mine),
        "accuracy_of_lmms_eval": results["results"][TASK]["accuracy,none"],
        "retention_in_results": results["throughput"]["avg_retention"],
    }


def same(row: dict[str, Any]) -> bool:
    counts = {row[name] for name in ("samples_of_lmms_eval", "equal_texts", "equal_counts", "equal_scores")}
    return counts == {row["samples"]} and abs(row["accuracy"] - row["accuracy_of_lmms_eval"]) < 1e-9


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
        write_scenes(folder, world="A", seed=options.seed, scenes=options.scenes)
        items = registry.benchmarks.get("questions").read(folder / "questions.jsonl")
        mine, spent = ours(items)
        print(f"{len(items)} questions under {len(CONDITIONS)} conditions in {spent:.0f} s", flush=True)
        for number, (method, retention) in enumerate(CONDITIONS):
            results, lines, seconds = theirs(folder, folder / f"out-{number}", method, retention, options.threads)
            row = {"method": method, "retention": retention, **compared(items, mine[method, retention], results, lines)}
            rows.append(row | {"seconds_of_lmms_eval": round(seconds, 1)})
            print(json.dumps(rows[-1]), flush=True)
    names = ("lmms_eval", "datasets", "av", "numpy", "accelerate")
    result = {
        "what": f"{len(items)} questions about {options.scenes} scenes of the testbed's world A (seed {options.seed}), "
        "by lmms-eval's command with the plug-in, and by the examiner of `vidsieve eval questions`",
        "machine": machine(),
        "versions": {name: version(name) for name in names},
        "seconds_of_vidsieve_for_all_conditions": round(spent, 1),
        "conditions": rows,
        "same": all(map(same, rows)),
    }
    write_result(options.json, result)
    if not result["same"]:
        raise SystemExit("lmms-eval and vidsieve differ: see the counts above")


if __name__ == "__main__":
    main()
