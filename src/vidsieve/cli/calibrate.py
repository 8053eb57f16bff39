"""`vidsieve calibrate`: a retention that follows each video, with a bound on what it loses, or frames for a budget."""

from __future__ import annotations

import re
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from vidsieve import registry
from vidsieve.cli import options, output, shared
from vidsieve.errors import EvaluationError
from vidsieve.io.files import writing
from vidsieve.io.journal import shard_path
from vidsieve.io.limits import Limits
from vidsieve.io.texts import percent
from vidsieve.retention import FrameRule, Rule


def calibrate(
    method: Annotated[
        str,
        typer.Argument(
            help="A policy (folder, or OWNER/NAME on the hub), a method (vidsieve list), or name:variant.",
            metavar="METHOD",
        ),
    ],
    data: Annotated[Path, typer.Argument(help="A file of questions whose answers are known.", show_default=False)],
    tolerate: Annotated[
        float, typer.Option(help="Accuracy that may be lost on average over videos; 0.01: one point.", min=0, max=1)
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="Chance that the bound holds.", min=0, max=1)] = 0.9,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    frames: Annotated[
        str, typer.Option(help="Frames taken evenly from each video; with --tokens several numbers, as 16,64,256.")
    ] = "32",
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Numbers of tokens kept, as 256,512: measure each with each number of frames, for --frames auto.",
            show_default=False,
        ),
    ] = None,
    positions: options.Positions = None,
    answer: Annotated[
        str, typer.Option(help="'generate' text and read its letter, or 'choice': the likeliest letter.")
    ] = "generate",
    save: Annotated[
        Path | None,
        typer.Option(help="File of the rule.", show_default="config.json of a policy's folder, else NAME-rule.json"),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the run; the same command resumes it.", show_default="runs/calibrate/NAME-rule"
        ),
    ] = None,
    max_pixels: options.MaxPixels = Limits.pixels,
    threads: options.Threads = 0,
    max_row: options.MaxRow = Limits.row,
    json: options.Json = None,
) -> None:
    """Fit a rule from a video's scores to its retention, and bound what it loses, for --retention calibrated.

    With --tokens: measure accuracy by frames read and tokens kept, for --frames auto. There --tolerate is how far below
    the best the fewest frames may be, and nothing is bounded.
    """
    if not (0 < tolerate < 1 and 0 < confidence < 1):
        raise EvaluationError(f"--tolerate and --confidence lie between 0 and 1, got {tolerate:g} and {confidence:g}")
    counts, kept = _counts("--frames", frames), _counts("--tokens", tokens or "")
    if len(counts) != 1 and not kept:
        raise EvaluationError(f"--frames {frames} are several numbers: give --tokens too, to measure --frames auto")
    model = options.named_model(model)
    registry.check_known(method)
    output.check_output(json, reads=[data])
    output.check_output(save, reads=[data])
    name = f"{re.sub('[:/@]', '-', method)}-{'frames' if kept else 'rule'}"
    folder = folder or Path("runs/calibrate") / name
    output.check_output(folder / "run.json")
    output.check_free(shard_path(folder, (0, 1)))
    shared.set_threads(threads)
    from msgspec import to_builtins

    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.calibration import check_enough
    from vidsieve.evaluation.conditions import method_for
    from vidsieve.evaluation.tasks.calibrating import CalibrationTask, FramesTask, frame_conditions, ladder_conditions
    from vidsieve.evaluation.tasks.questions import items_of
    from vidsieve.io.hub import is_hub_name
    from vidsieve.loading import split_variant
    from vidsieve.policies import policy_folder, save_rule

    items = items_of(registry.benchmarks.get("questions"), data)
    if not kept:
        check_enough(len({item.video for item in items}), tolerate, confidence)
    shared.quiet()
    chosen = method_for(method, model)
    network, processor = shared.load_model(model, dtype=dtype, device=device, positions=positions)
    asked = (registry.benchmarks.get("questions"), items, adapter_for(network), processor, model, answer)
    about = {"data": data.name} | ({} if positions is None else {"positions": positions})
    label = method if registry.is_policy(method) else ""
    rule: Rule | FrameRule
    if kept:
        frames_task = FramesTask(*asked, about=about, tolerance=tolerate)
        conditions = frame_conditions(chosen, counts, kept, label)
        rule = frames_task.rule(shared.run_task(frames_task, conditions, "videos", folder=folder, json=json))
    else:
        task = CalibrationTask(*asked, about=about, tolerance=tolerate, confidence=confidence)
        conditions = ladder_conditions(chosen, counts[0], label)
        rule = task.rule(shared.run_task(task, conditions, "videos", folder=folder, json=json))
    # The hub's cache is not written, and a policy's own rule is for the variant that it was trained as.
    if save is None and label and not is_hub_name(method) and not split_variant(method)[1]:
        where = policy_folder(method)
        save_rule(where, rule)
        suffix = ""
    else:
        where = save or Path(f"{name}.json")
        with writing(where) as temporary:
            temporary.write_text(dumps(to_builtins(rule), indent=2) + "\n", encoding="utf-8")
        suffix = f":{where}"
    more = "" if positions is None else f" --positions {positions}"
    if isinstance(rule, FrameRule):
        best = ", ".join(f"{rule.frames_for(count)} for {count} tokens" for count in rule.tokens)
        output.out.print(
            f"Frames to read: {best}.\nsaved: {where}; use it with --tokens {rule.tokens[-1]} --frames auto{suffix}"
            f"{more}",
            markup=False,
            soft_wrap=True,
        )
        return
    output.out.print(
        f"The rule keeps {percent(rule.retention)} of the tokens on average and loses {100 * rule.loss:.2f} points "
        f"on {rule.videos} videos; with confidence {confidence:g} at most {100 * tolerate:g} points on videos like "
        f"these. The least fixed retention with the same bound is {rule.fixed:g}.\n"
        f"saved: {where}; use it with --retention calibrated{suffix} --frames {counts[0]}{more}",
        markup=False,
        soft_wrap=True,
    )


def _counts(option: str, text: str) -> list[int]:
    """Return the whole numbers of a comma-separated list, ascending, each once."""
    words = options.words(text)
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise EvaluationError(f"{option} takes whole numbers from 1 on, as 16,64; got {text!r}")
    return sorted({int(word) for word in words})
