"""Published layouts from end to end, and the blind test against the truth, on files of the testbed.

Scenes are written in every layout with 5 % of the videos broken on purpose, checked, and trained on; the filter is run
on questions of which a fifth has options that give the answer away.

    python benchmarks/published.py --json benchmarks/results/published.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vidsieve.loading import load_model
from vidsieve.testbed.files import LAYOUTS, write_scenes
from vidsieve.training.data.checking import check_file
from vidsieve.training.data.filtering import filter_file
from vidsieve.training.data.pseudo import pseudo_file
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.recipes import train_policy
from vidsieve.training.sources import Files

QUICK = {"prompts_per_step": 8, "workers": 2}
CHOICE, CAPTION = QUICK | {"token_rollouts": 2, "frame_rollouts": 0}, QUICK | {"rollouts": 2}


def listed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(lines: list[dict[str, Any]], truth: dict[str, Any]) -> dict[str, Any]:
    """Return how the videos of a list compare with those that were broken."""
    found = {Path(line["where"]).stem for line in lines if line["what"].endswith(" video")}
    broken = {Path(name).stem for name in truth["broken"]}
    return {"broken": len(broken), "listed": len(found), "wrongly": len(found - broken), "not": len(broken - found)}


def layout_row(folder: Path, layout: str, scenes: int, broken: float, testbed: Any) -> dict[str, Any]:
    """Return what became of one layout."""
    write_scenes(folder / layout, world="dense", seed=61, scenes=scenes, layout=layout, broken=broken)
    truth = json.loads((folder / layout / "truth.json").read_text())
    result: dict[str, Any] = {"layout": layout, "files": []}
    for number, name in enumerate(truth["files"]):
        path, run = folder / layout / name, folder / f"{layout}-{number}"
        start = time.perf_counter()
        row: dict[str, Any] = {"file": Path(name).name}
        if layout in ("llava-onevision", "llava-images"):
            made = pseudo_file(path, folder / f"{layout}.jsonl", count=scenes)
            row |= {"images": made.images, "left_out": made.as_dict()["skipped"]}
            path = folder / f"{layout}.jsonl"
            found = check_file(path)
            row["usable_images_right"] = made.images == scenes - len(truth["broken"])
        else:
            found = check_file(path, skipped=Skipped(run.with_suffix(".jsonl")))
            row["check"] = same(listed(run.with_suffix(".jsonl")), truth)
        kinds = {group["kind"] for group in found.groups}
        row |= {"rows": found.rows, "usable": found.usable, "kinds": sorted(kinds)}
        method, settings = ("cacovid", CHOICE) if "multiple choice" in kinds else ("score", CAPTION)
        if kinds == {"free-form"}:
            method, settings = "cacovid", CHOICE | {"reward": "generate", "answer_tokens": 2}
        rows = next(g["rows"] for g in found.groups if g["kind"] in ("multiple choice", "caption", "free-form"))
        steps = -(-min(rows, 3 * scenes) // settings["prompts_per_step"])
        record = train_policy(method, *testbed, run, settings | {"steps": steps}, files=Files(path))
        row |= {"method": method, "prompts": record["prompts"], "skipped": record["skipped"]}
        if "check" in row:
            row["train"] = same(listed(run / "skipped.jsonl"), truth)
        row["seconds"] = round(time.perf_counter() - start, 1)
        result["files"].append(row)
        print(json.dumps(row))
    return result


def filters(folder: Path, scenes: int, models: dict[str, Any]) -> list[dict[str, Any]]:
    """Return recall and precision of what filters drop, against the questions that give themselves away."""
    source = folder / "leaky" / "Video-R1-260k.json"
    write_scenes(source.parent, world="dense", seed=62, scenes=scenes, layout="video-r1", leaked=0.2)
    truth = json.loads((source.parent / "truth.json").read_text())
    planted = {(leak["video"], leak["question"]) for leak in truth["leaked"]}
    rows = []
    for names in (["testbed"], list(models)):
        for seeds in (1, 2, 3, 5):
            for rule in ("any", "all") if len(names) > 1 else ("any",):
                out, work = folder / "left.jsonl", folder / f"blind-{len(names)}-{seeds}"
                found = filter_file(
                    source, out, [models[name] for name in names], rule, seeds=seeds, work=work, names=names
                )
                gone = {
                    (Path(row["video"]).relative_to("leaky").as_posix(), row["question"])
                    for row in listed(folder / "left.dropped.jsonl")
                }
                rows.append(
                    {
                        "models": names,
                        "rule": rule,
                        "seeds": seeds,
                        "questions": found.questions,
                        "planted": len(planted),
                        "dropped": len(gone),
                        "recall": len(gone & planted) / len(planted),
                        "precision": len(gone & planted) / len(gone),
                        "good_dropped": len(gone - planted) / (found.questions - len(planted)),
                        "blind_accuracy": found.blind_accuracy,
                    }
                )
                print(json.dumps(rows[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--broken", type=float, default=0.05)
    options = parser.parse_args()
    torch.set_num_threads(1)
    testbed = load_model("testbed")
    models = {"testbed": testbed, "talker": load_model("workbench/testbed/talker")}
    with tempfile.TemporaryDirectory() as name:
        layouts = [
            layout_row(Path(name), layout, options.scenes, options.broken, testbed)
            for layout in LAYOUTS
            if layout != "vidsieve"
        ]
        filtered = filters(Path(name), options.scenes, models)
    result = {"scenes": options.scenes, "broken": options.broken, "layouts": layouts, "filter": filtered}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
