"""Calibrated retention on the testbed: how often the bound holds, and how many tokens it saves.

`--gather` answers every question at every step of the ladder and writes an .npz file per world; without it these files
are split by scene 200 times: each split calibrates a rule on three quarters of its scenes and measures it on the rest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator

import vidsieve
from vidsieve.adapters.pruning import adapter_for
from vidsieve.answering import next_token_logits
from vidsieve.cli.shared import quiet
from vidsieve.compressors.calibrated import LADDER, features
from vidsieve.evaluation.calibration import Measured, calibrate, predicted, steps_at
from vidsieve.evaluation.conditions import method_for
from vidsieve.evaluation.tasks.testbed import FULL, _right, logits_of_one_selection, read_scene, scene_questions
from vidsieve.io.machine import write_result
from vidsieve.loading import load_model
from vidsieve.report.pictures import new_figure, save
from vidsieve.retention import FEATURES

SPLITS, TEST_SHARE = 200, 0.25
TOLERANCES, CONFIDENCE = (0.01, 0.02, 0.05), 0.9


@torch.no_grad()
def gather(name: str, model_name: str, world: str, seed: int, questions: int, folder: Path) -> None:
    """Write features, scores and shares kept at every step to ``folder/name-world.npz``; go on where it ends."""
    quiet()
    model, processor = load_model(model_name)
    adapter = adapter_for(model)
    method = method_for(name, model_name)
    scenes = scene_questions(world, seed, questions)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(':', '-')}-{world}.npz"
    found = gathered(path, seed, [len(some) for some in scenes])
    for index, some in list(enumerate(scenes))[len(set(found["videos"])) :]:
        scene = read_scene(adapter, processor, world, seed, index, len(some))
        everything = FULL.select(adapter, scene, 0, Generator())
        full = right_of(adapter, scene, [everything] * len(some))
        given = range(len(some)) if method.needs else (0,)  # what reads the video alone selects once for all questions
        videos = [adapter.video_tokens(scene.encoded, number, method.needs) for number in given]
        rows, marks, shares = [], [], []
        for retention in LADDER:
            at = method.with_retention(retention)
            chosen = [at.compress(video, generator=Generator().manual_seed(seed + index)) for video in videos]
            chosen *= len(some) // len(chosen)
            total = scene.encoded.videos[0].features.grid.num_tokens
            rows.append([features(selection.scores, selection.num_kept, total) for selection in chosen])
            shares.append([selection.num_kept / total for selection in chosen])
            marks.append(right_of(adapter, scene, chosen))
        found["features"] += np.array(rows).transpose(1, 0, 2).tolist()
        found["right"] += np.array(marks).T.tolist()
        found["kept"] += np.array(shares).T.tolist()
        found["full"] += full
        found["videos"] += [index] * len(some)
        if index % 25 == 24 or index == len(scenes) - 1:
            part = path.with_suffix(".part.npz")
            np.savez(part, ladder=LADDER, seed=seed, **found)
            part.replace(path)
            print(f"{name} {world}: scene {index + 1} of {len(scenes)}", flush=True)


def gathered(path: Path, seed: int, questions: list[int]) -> dict[str, list[Any]]:
    """Return what a file holds of the first scenes, those with as many `questions` as asked for."""
    names = ("features", "right", "full", "kept", "videos")
    if not path.exists():
        return {name: [] for name in names}
    data = np.load(path)
    if (data["seed"], *data["ladder"]) != (seed, *LADDER):
        raise SystemExit(f"{path} has another seed or ladder: name another folder")
    videos = data["videos"]
    counts = np.bincount(videos, minlength=len(questions))
    short = [index for index, count in enumerate(questions) if counts[index] != count]
    return {name: data[name][videos < min(short, default=len(questions))].tolist() for name in names}


def right_of(adapter: Any, scene: Any, chosen: list[Any]) -> list[bool]:
    """Return whether each question of a scene is answered rightly with the tokens chosen for it, or for all of them."""
    if all(torch.equal(selection.indices, chosen[0].indices) for selection in chosen):
        return _right(scene, logits_of_one_selection(adapter, scene.encoded, chosen[0]))
    return _right(scene, next_token_logits(adapter, adapter.plan(scene.encoded, selected=(chosen, []))))


def read(path: Path) -> Measured:
    """Return what `gather` wrote."""
    data = np.load(path)
    losses = data["full"].astype(float)[:, None] - data["right"].astype(float)
    return Measured(tuple(data["ladder"].tolist()), data["features"], losses, data["kept"], data["videos"])


def applied(rule: Any, measured: Measured) -> tuple[float, float, float]:
    """Return mean loss, mean retention over videos, and the share of questions that kept everything."""
    model = np.array(rule.means), np.array(rule.scales), np.array([rule.bias, *rule.weights])
    steps = steps_at(predicted(model, measured.features), rule.threshold)
    rows = np.arange(len(steps))
    whole = np.zeros((len(steps), 1))
    losses = np.concatenate([measured.losses, whole], 1)[rows, steps]
    kept = np.concatenate([measured.kept, whole + 1], 1)[rows, steps]
    every = float((steps == len(rule.ladder)).mean())
    return float(measured.by_video(losses).mean()), float(measured.by_video(kept).mean()), every


def fixed_of_equal_loss(measured: Measured, loss: float) -> float:
    """Return the least fixed retention, between steps by a straight line, whose mean loss is at most `loss`."""
    ladder = [*measured.ladder, 1.0]
    means = [float(measured.by_video(measured.losses[:, i]).mean()) for i in range(len(measured.ladder))] + [0.0]
    for step in range(len(ladder) - 1, 0, -1):
        if means[step - 1] > loss:
            low, high = means[step], means[step - 1]
            along = max(0.0, (loss - low) / (high - low)) if high > low else 0.0
            return float(ladder[step] + along * (ladder[step - 1] - ladder[step]))
    return float(ladder[0])


def study(measured: Measured, others: dict[str, Measured], tolerance: float) -> dict[str, Any]:
    """Return what `SPLITS` random splits by scene give: how often the bound held, and retentions."""
    scenes = np.unique(measured.videos)
    rows = []
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(scenes)
        test = round(TEST_SHARE * len(order))
        rule = calibrate(
            measured.of(order[test:]), "method", "ours", tolerance=tolerance, confidence=CONFIDENCE, seed=split
        )
        rest = measured.of(order[:test])
        loss, kept, every = applied(rule, rest)
        fixed = float(rest.by_video(rest.losses[:, rest.ladder.index(rule.fixed)]).mean()) if rule.fixed < 1 else 0.0
        elsewhere = {name: applied(rule, other)[:2] for name, other in others.items()}
        rows.append(
            {
                "loss": loss,
                "retention": kept,
                "kept_all": every,
                "fixed": rule.fixed,
                "fixed_loss": fixed,
                "equal": fixed_of_equal_loss(rest, loss),
                "elsewhere": elsewhere,
            }
        )

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    return {
        "tolerance": tolerance,
        "splits": SPLITS,
        "scenes": len(scenes),
        "questions": len(measured.videos),
        "within": float(np.mean([row["loss"] <= tolerance for row in rows])),
        "loss": mean("loss"),
        "retention": mean("retention"),
        "kept_all": mean("kept_all"),
        "fixed_retention": mean("fixed"),
        "fixed_within": float(np.mean([row["fixed_loss"] <= tolerance for row in rows])),
        "fixed_of_equal_loss": mean("equal"),
        "elsewhere": {
            name: {
                "loss": float(np.mean([row["elsewhere"][name][0] for row in rows])),
                "retention": float(np.mean([row["elsewhere"][name][1] for row in rows])),
                "within": float(np.mean([row["elsewhere"][name][0] <= tolerance for row in rows])),
            }
            for name in others
        },
    }


def shifted(measured: Measured, tolerance: float) -> dict[str, float]:
    """Return what a rule loses on the quarter of the scenes that 5 % harms most, calibrated on the other scenes alone.

    So the calibration videos are not drawn as the others are, and the bound need not hold.
    """
    harm = measured.by_video(measured.losses[:, measured.ladder.index(0.05)])
    order = np.unique(measured.videos)[np.argsort(harm, kind="stable")]
    test = round(TEST_SHARE * len(order))
    rule = calibrate(measured.of(order[:-test]), "method", "ours", tolerance=tolerance, confidence=CONFIDENCE, seed=0)
    loss, kept, _ = applied(rule, measured.of(order[-test:]))
    return {"loss": loss, "retention": kept}


def curve(measured: Measured) -> dict[str, list[float]]:
    """Return the steps of the ladder, and the mean loss over videos of a fixed retention at each."""
    losses = [float(measured.by_video(measured.losses[:, step]).mean()) for step in range(len(measured.ladder))]
    return {"retentions": list(measured.ladder), "losses": losses}


def figure(result: dict[str, Any], path: Path) -> None:
    """Draw loss against retention, a panel a method: fixed retentions, and the calibrated ones with their bounds."""
    curves = result["fixed"]
    canvas = new_figure(figsize=(4.6 * len(curves) + 1.2, 3.6), layout="constrained")
    panels = canvas.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for panel, (method, fixed) in zip(panels, curves.items(), strict=True):
        losses = [100 * loss for loss in fixed["losses"]]
        panel.plot(fixed["retentions"], losses, color="0.5", marker="o", markersize=3, label="fixed retention")
        rows = [row for row in result["rows"] if row["method"] == method]
        for number, row in enumerate(rows):
            tolerance, colour = 100 * row["tolerance"], f"C{number}"
            panel.axhline(tolerance, color=colour, linewidth=1, linestyle=":")
            label = f"calibrated, bound {tolerance:g}"
            panel.plot(row["retention"], 100 * row["loss"], "D", color=colour, label=label)
        panel.set_xscale("log")
        panel.set_xticks(fixed["retentions"], [f"{100 * at:g} %" for at in fixed["retentions"]], fontsize=7)
        panel.minorticks_off()
        panel.set_ylim(-1, 2 * 100 * max(row["tolerance"] for row in rows))
        panel.set_title(f"{method} ({rows[0]['scenes']:,} scenes)", fontsize=10, loc="left")
        panel.set_xlabel("video tokens kept")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("points of accuracy lost")
    panels[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(canvas, path, dpi=130)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gather", nargs=2, metavar=("METHOD", "WORLD"))
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--seed", type=int, default=9501)
    parser.add_argument("--questions", type=int, default=16_400, help="of 700 scenes: 525 calibrate")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="also draw loss against retention, .png")
    given = parser.parse_args()
    if given.gather:
        gather(given.gather[0], given.model, given.gather[1], given.seed, given.questions, given.folder)
        return
    rows, fixed = [], {}
    for path in sorted(given.folder.glob("*-dense.npz")):
        name = path.stem.removesuffix("-dense")
        others = {
            other.stem.removeprefix(f"{name}-"): read(other)
            for other in sorted(given.folder.glob(f"{name}-*.npz"))
            if other != path
        }
        measured = read(path)
        fixed[name] = curve(measured)
        for tolerance in TOLERANCES:
            row = {"method": name, **study(measured, others, tolerance), "shifted": shifted(measured, tolerance)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    result = {"features": FEATURES, "vidsieve": vidsieve.__version__, "fixed": fixed, "rows": rows}
    if given.json:
        write_result(given.json, result)
    if given.figure:
        figure(result, given.figure)


if __name__ == "__main__":
    main()
