"""Frames bought with tokens: more frames with fewer tokens each, against a few frames whole, at equal tokens.

Long videos of the testbed (`vidsieve.testbed.long`): 16 frames matter, in four clips. The model is the shipped one,
with positions counted over the kept tokens. Every video is encoded once; its measurements are appended to a journal in
FOLDER, so that the same command goes on where it was stopped, and `--videos` can grow. Three parts:

- `condition`: can the model answer at all? The relevant frames whole, and the tokens of the question's objects, with
  positions counted anew and with the original ones.
- `calibration`: on other videos, accuracy by frames read and tokens kept; `FrameRule` makes numbers of frames of it.
- `test`: 16 frames whole against the planned frames and tokens. Then the time to the first token of both.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vidsieve._version import __version__
from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.transformers_api import cache_argument
from vidsieve.answering import answer, next_token_logits
from vidsieve.cli.shared import quiet
from vidsieve.compressors.base import Compressor
from vidsieve.evaluation.conditions import method_for
from vidsieve.evaluation.stats import clustered_mean, paired_difference
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model
from vidsieve.report.pictures import save
from vidsieve.retention import FrameRule, Tokens
from vidsieve.testbed.long import LongScene
from vidsieve.testbed.model import WORD_ID, chat_inputs
from vidsieve.testbed.questions import Question
from vidsieve.types import Selection
from vidsieve.video.reading import Video
from workbench.testbed.model import repeated_features

METHODS = ("cacovid", "sieve", "score", "vidcom2", "divprune")
LENGTHS = (64, 128, 256)
WHOLE, CELLS = 16, 36
TOKENS = WHOLE * CELLS
FRAMES, KEPT = (16, 64, 256), (TOKENS // 2, TOKENS)
"""Frames and tokens of the calibration; a video of fewer frames is read whole."""
SEEDS = {"condition": 9701, "calibration": 9711, "test": 9721}
TIMED, ROUNDS = ("cacovid", "score"), 3


def uniform(frames: int, count: int) -> Tensor:
    """Return the numbers of `count` evenly spaced frames, or of all, as `read_video` takes them."""
    return torch.from_numpy(np.linspace(0, frames - 1, min(frames, count)).round().astype(np.int64))


class Clip:
    """One long video, encoded once, with some of its questions."""

    def __init__(self, adapters: dict[str, Adapter], processor: Any, scene: LongScene, questions: int) -> None:
        self.adapters, self.processor, self.scene = adapters, processor, scene
        self.asked: list[Question] = scene.questions()[:questions]
        inputs = chat_inputs(processor, scene.pixels(), [q.text for q in self.asked])
        (self.features,) = adapters["compact"].features(inputs)
        self._inputs = inputs
        relevant = torch.zeros(scene.frames, dtype=torch.bool)
        relevant[torch.from_numpy(scene.times)] = True
        self.relevant = relevant

    def encoded(self, frames: Tensor, question: int, positions: str = "compact") -> Any:
        """Return the prompt of one question about some of the frames."""
        kept = self.features.at_frames(frames)
        row = {name: self._inputs[name][question] for name in ("input_ids", "attention_mask")}
        first = int((row["input_ids"] == self.processor.video_token_id).nonzero()[0])
        index = torch.arange(len(row["input_ids"]))
        read = index < first
        read |= index >= first + (self.scene.frames - len(frames)) * CELLS
        read &= row["attention_mask"].bool()
        inputs: dict[str, Any] = {name: value[read][None] for name, value in row.items()}
        inputs["mm_encoder_outputs"] = {"video": repeated_features(kept, 1)}
        return self.adapters[positions].encode(inputs)

    def right(self, frames: Tensor, selections: Sequence[Selection], positions: str = "compact") -> list[bool]:
        """Return whether each question is answered rightly from a selection of the frames' tokens.

        Where all questions have one selection, the LLM reads it once for all of them.
        """
        adapter, marks, cache = self.adapters[positions], [], None
        shared = all(selection is selections[0] for selection in selections)
        for number, (question, selection) in enumerate(zip(self.asked, selections, strict=True)):
            plan = adapter.plan(self.encoded(frames, number, positions), selected=([selection], []))
            if shared:
                logits, cache = after_video(adapter, plan, self.processor.video_token_id, cache)
            else:
                logits = next_token_logits(adapter, plan)[0]
            best = int(logits[[WORD_ID[word] for word in question.options]].argmax())
            marks.append(question.options[best] == question.answer)
        return marks

    def chosen(self, method: Compressor, frames: Tensor) -> list[Selection]:
        """Return what a method keeps of the frames for each question; once for all if it does not read it."""
        adapter, found = self.adapters["compact"], []
        for number in range(len(self.asked)):
            if number and not method.needs:
                found.append(found[0])
                continue
            video = adapter.video_tokens(self.encoded(frames, number), 0, method.needs)
            found.append(method.compress(video, generator=Generator().manual_seed(self.scene.index)))
        return found

    def share(self, frames: Tensor, selections: Sequence[Selection]) -> float:
        """Return the share of the kept tokens that lie in frames of the scene."""
        return float(np.mean([self.relevant[frames[s.indices // CELLS]].float().mean() for s in selections]))


def after_video(adapter: Adapter, plan: Plan, token: int, cache: Any) -> tuple[Tensor, Any]:
    """Return the next token's logits (V,), and the cache of the prompt up to its video's end, or the one given."""
    inputs = dict(plan.inputs)
    ids, places = inputs.pop("input_ids"), inputs.pop("position_ids")
    end = int((ids[0] == token).nonzero()[-1]) + 1
    mask = inputs.pop("attention_mask")
    if cache is None:
        with plan.acting():
            cache = adapter.model(
                input_ids=ids[:, :end],
                position_ids=places[:, :end],
                attention_mask=mask[:, :end],
                use_cache=True,
                logits_to_keep=1,
                **inputs,
            ).past_key_values
    logits = adapter.model(
        input_ids=ids[:, end:],
        position_ids=places[:, end:],
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(adapter.model): copy.deepcopy(cache)},
    ).logits
    return logits[0, -1], cache


def everything(frames: Tensor) -> Selection:
    """Return all tokens of some frames."""
    return Selection(torch.arange(len(frames) * CELLS))


@torch.no_grad()
def measured(clip: Clip, part: str, methods: dict[str, Compressor], planned: dict[str, int]) -> dict[str, Any]:
    """Return by condition the marks of a video's questions, and of tests the share of tokens in relevant frames."""
    every, count = torch.arange(clip.scene.frames), len(clip.asked)
    marks: dict[str, list[bool]] = {}
    shares: dict[str, float] = {}
    if part == "condition":
        frames = torch.from_numpy(clip.scene.times)
        whole = Selection((frames[:, None] * CELLS + torch.arange(CELLS)).flatten())
        objects = [Selection(torch.tensor(sorted(q.targets))) for q in clip.asked]
        for positions in ("compact", "installed"):
            marks[f"relevant frames/{positions}"] = clip.right(every, [whole] * count, positions)
            marks[f"question oracle/{positions}"] = clip.right(every, objects, positions)
    elif part == "calibration":
        for read in FRAMES:
            frames = uniform(clip.scene.frames, read)
            for name, method in methods.items():
                for kept in KEPT:
                    chosen = clip.chosen(method.with_retention(Tokens(kept)), frames)
                    marks[f"{name}/{read}/{kept}"] = clip.right(frames, chosen)
    else:
        frames = uniform(clip.scene.frames, WHOLE)
        marks["whole"] = clip.right(frames, [everything(frames)] * count)
        shares["whole"] = clip.share(frames, [everything(frames)])
        relevant = torch.from_numpy(clip.scene.times)
        marks["relevant"] = clip.right(relevant, [everything(relevant)] * count)
        for name, read in planned.items():
            frames = uniform(clip.scene.frames, read)
            chosen = clip.chosen(methods[name].with_retention(Tokens(TOKENS)), frames)
            marks[name], shares[name] = clip.right(frames, chosen), clip.share(frames, chosen)
    return {"marks": marks, "shares": shares}


def rules(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, FrameRule]:
    """Return the rule of each method from the calibration's records, as `vidsieve calibrate --tokens` makes it."""
    found = {}
    for name in names:
        table = [
            [float(np.mean([m for r in records for m in r["marks"][f"{name}/{read}/{kept}"]])) for kept in KEPT]
            for read in FRAMES
        ]
        found[name] = FrameRule(
            method=name,
            variant="ours",
            frames=FRAMES,
            tokens=KEPT,
            accuracy=tuple(map(tuple, table)),
            tolerance=0.01,
            videos=len(records),
            questions=sum(len(next(iter(r["marks"].values()))) for r in records),
            model_digest="",  # of no model: used here alone
            data="long videos of the testbed",
            model="testbed",
        )
    return found


def timed(model: Any, processor: Any, methods: dict[str, Compressor], planned: dict[str, int]) -> list[dict[str, Any]]:
    """Return milliseconds of processor time to the first token: 16 frames whole, and the planned ones, in turns."""
    rows = []
    for length in LENGTHS:
        scene = LongScene("dense", SEEDS["test"], 0, length)
        pixels, question = scene.pixels(), scene.questions()[0].text
        ways: dict[str, tuple[Tensor, Compressor | None]] = {"whole": (uniform(length, WHOLE), None)}
        for name in TIMED:
            read = planned[name]
            ways[name] = uniform(length, read), methods[name].with_retention(Tokens(TOKENS))
        spent: dict[str, list[float]] = {name: [] for name in ways}
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for turn in range(ROUNDS + 1):
            for name, (frames, method) in ways.items():
                stamps = frames.double().numpy()
                video = Video(pixels[frames.numpy()], stamps, (), float(length), 1.0, length, pixels.shape[1:3])
                start = time.process_time()
                given = answer(model, processor, video, question, method, max_new_tokens=1)
                if turn:  # the first warms up
                    spent[name].append(1e3 * (time.process_time() - start))
                    parts[name].append(given.ms)
        for name, (frames, _) in ways.items():
            ratios = [mine / theirs for mine, theirs in zip(spent[name], spent["whole"], strict=True)]
            rows.append(
                {
                    "length": length,
                    "name": name,
                    "frames": len(frames),
                    "first_token_ms": statistics.median(spent[name]),
                    "slower": statistics.median(ratios),
                    "slower_min_max": [min(ratios), max(ratios)],
                    "wall_ms": {
                        part: statistics.median(row.get(part, 0.0) for row in parts[name])
                        for part in ("preprocess", "encode", "select", "prefill")
                    },
                }
            )
    return rows


def summary(records: Sequence[dict[str, Any]], planned: dict[str, FrameRule], times: Any) -> dict[str, Any]:
    """Return the result: conditions, rules, accuracies with paired differences by length of the video, and times."""
    condition, test = [], []
    for length in (WHOLE, *LENGTHS):
        for part, rows in (("condition", condition), ("test", test)):
            some = [r for r in records if r["part"] == part and r["frames"] == length]
            if not some:
                continue
            clusters = [number for number, r in enumerate(some) for _ in next(iter(r["marks"].values()))]
            marks = {name: [float(m) for r in some for m in r["marks"][name]] for name in some[0]["marks"]}
            for name, values in marks.items():
                mean = clustered_mean(values, clusters)
                row: dict[str, Any] = {"length": length, "name": name, "accuracy": mean.mean, "stderr": mean.stderr}
                row |= {"videos": len(some), "questions": len(values)}
                if part == "test" and name != "whole":
                    gap = paired_difference(values, marks["whole"], clusters)
                    row["vs_whole"] = {"diff": gap.mean, "stderr": gap.stderr, "interval": list(gap.interval)}
                if name in some[0]["shares"]:
                    row["relevant_share"] = float(np.mean([r["shares"][name] for r in some]))
                if name in planned:
                    row["frames_read"] = min(length, planned[name].frames_for(TOKENS))
                rows.append(row)
    return {
        "vidsieve": __version__,
        "machine": machine(),
        "tokens": TOKENS,
        "whole_frames": WHOLE,
        "condition": condition,
        "rules": {
            name: {"frames": r.frames, "tokens": r.tokens, "accuracy": r.accuracy, "questions": r.questions}
            for name, r in planned.items()
        },
        "test": test,
        "times": times,
    }


# -- the page ---------------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(cells)} |" for cells in rows)]


def percent(row: dict[str, Any]) -> str:
    """Return an accuracy with its standard error."""
    return f"{row['accuracy']:.3f} ± {row['stderr']:.3f}"


def page(result: dict[str, Any], figure: str) -> Iterator[str]:
    """Yield the measured lines of docs/reinvest.md."""
    condition = {(row["name"], row["length"]): row for row in result["condition"]}
    lengths = sorted({row["length"] for row in result["condition"]})
    first = result["condition"][0]
    yield "## Can the model answer such videos?"
    yield ""
    yield (
        "The shipped deep model has seen positions up to about 700 in training; a video of 256 frames reaches 9,216. "
        f"Right answers ({first['questions']} questions about {first['videos']} videos of each length, chance 0.25):"
    )
    yield ""
    names = {"relevant frames": "the 16 relevant frames, whole", "question oracle": "the tokens asked about"}
    ways = {"compact": "counted over the kept tokens", "installed": "original"}
    yield from table(
        ["tokens", "positions", *(f"{length} frames" for length in lengths)],
        [
            [names[name], ways[way], *(percent(condition[f"{name}/{way}", length]) for length in lengths)]
            for name in names
            for way in ways
        ],
    )
    yield ""
    yield (
        "With original positions it cannot. With positions counted over the kept tokens (`--positions compact`) it "
        "answers from 576 tokens as well as in a short video, without any further training; everything below is "
        "measured so. A handful of tokens alone is worse then: no question ever followed so closely in training."
    )
    yield ""
    yield "## Sixteen frames whole, or more frames with fewer tokens"
    yield ""
    yield f"![accuracy by length of the video]({figure})"
    yield ""
    test = {(row["name"], row["length"]): row for row in result["test"]}
    lengths = sorted({row["length"] for row in result["test"]})
    counts = {length: test["whole", length] for length in lengths}
    said = ", ".join(f"{row['questions']} questions about {row['videos']} of {n} frames" for n, row in counts.items())
    yield (
        f"{result['tokens']} tokens for the LLM in every row; new videos ({said}). Accuracy ± standard error, and the "
        "paired difference to 16 frames whole with its 95 % interval, clustered by video. *In clips*: share of the "
        "kept tokens that lie in the 16 frames that matter."
    )
    yield ""
    rows = []
    for length in lengths:
        for name in dict.fromkeys(name for name, _ in test):
            row = test[name, length]
            label = {"whole": "16 frames whole", "relevant": "oracle: the relevant frames whole"}.get(name, f"`{name}`")
            gap = row.get("vs_whole")
            apart = f"{gap['diff']:+.3f} ({gap['interval'][0]:+.3f} to {gap['interval'][1]:+.3f})" if gap else "–"
            share = f"{100 * row['relevant_share']:.0f} %" if "relevant_share" in row else "–"
            rows.append([str(length), label, str(row.get("frames_read", 16)), percent(row), apart, share])
    yield from table(["video", "kept", "frames read", "accuracy", "− 16 frames whole", "in clips"], rows)
    yield ""
    yield "## What the calibration said"
    yield ""
    questions = next(iter(result["rules"].values()))["questions"]
    yield f"Accuracy on {questions} questions about other videos, of all three lengths together:"
    yield ""
    heads = [f"{read} frames, {kept} tokens" for kept in KEPT for read in FRAMES]
    yield from table(
        ["method", *heads],
        [
            [f"`{name}`", *(f"{rule['accuracy'][f][k]:.2f}" for k in range(len(KEPT)) for f in range(len(FRAMES)))]
            for name, rule in result["rules"].items()
        ],
    )
    yield ""
    yield "## What it costs"
    yield ""
    yield (
        "The LLM reads as many tokens, the vision encoder sees every frame. Processor time from pixels to the first "
        f"token on one core, medians of {ROUNDS} rounds in which all take turns; ratios are of one round:"
    )
    yield ""
    yield from table(
        ["video", "kept", "frames encoded", "first token, ms", "against 16 frames whole", "of it select, wall ms"],
        [
            [
                str(row["length"]),
                "16 frames whole" if row["name"] == "whole" else f"`{row['name']}`",
                str(row["frames"]),
                f"{row['first_token_ms']:,.0f}",
                f"{row['slower']:.2f}× ({row['slower_min_max'][0]:.2f} – {row['slower_min_max'][1]:.2f})",
                f"{row['wall_ms']['select']:,.0f}",
            ]
            for row in result["times"]
        ],
    )


def wrapped(text: str) -> str:
    """Return Markdown whose paragraphs have lines of at most 120 characters; tables stay."""
    lines = text.splitlines()
    return "\n".join(
        line if line.startswith(("|", "#", "!")) else textwrap.fill(line, 120, break_on_hyphens=False) for line in lines
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the figure: accuracy by length of the video."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for name in dict.fromkeys(row["name"] for row in result["test"]):
        rows = [row for row in result["test"] if row["name"] == name]
        label = {"whole": "16 frames whole", "relevant": "oracle: relevant frames"}.get(name, name)
        style = {"whole": "k-o", "relevant": "k:"}.get(name, "--o" if rows[0].get("frames_read") == WHOLE else "-o")
        axes.errorbar(
            [row["length"] for row in rows],
            [row["accuracy"] for row in rows],
            [1.96 * row["stderr"] for row in rows],
            fmt=style,
            capsize=2,
            markersize=4,
            label=label,
            zorder=1 if name == "whole" else 2,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set_xlabel("frames of the video, 16 of which matter")
    axes.set_ylabel("right answers")
    axes.axhline(0.25, color="grey", linewidth=0.8, linestyle="--")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.25)
    save(canvas, path, dpi=130)


OPEN, CLOSE = "<!-- measured -->", "<!-- /measured -->"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--videos", type=int, default=20, help="videos of each length")
    parser.add_argument("--held-out", type=int, default=4, help="videos of each length of the calibration")
    parser.add_argument("--questions", type=int, default=6, help="questions about each video")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/reinvest.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/reinvest.md"))
    parser.add_argument("--tables", action="store_true", help="measure nothing: write the page from --json")
    given = parser.parse_args()
    if not given.tables:
        write_result(given.json, run(given))
    result = json.loads(given.json.read_text("utf-8"))
    draw(result, given.page.with_suffix(".png"))
    before, _, rest = given.page.read_text("utf-8").partition(OPEN)
    made = "\n".join(page(result, given.page.with_suffix(".png").name))
    text = f"{before}{OPEN}\n\n{wrapped(made)}\n\n{CLOSE}{rest.partition(CLOSE)[2]}"
    given.page.write_text(text, encoding="utf-8")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what the journal lacks, and return the result."""
    quiet()
    model, processor = load_model("testbed", positions="compact")
    adapters = {way: adapter_for(model, positions=way) for way in ("compact", "installed")}
    methods = {name: method_for(name) for name in given.methods.split(",")}
    journal = given.folder / "journal.jsonl"
    given.folder.mkdir(parents=True, exist_ok=True)
    lines = journal.read_text("utf-8").splitlines() if os.path.exists(journal) else []
    records = [json.loads(line) for line in lines]
    planned: dict[str, FrameRule] = {}
    for part in SEEDS:
        if part == "test":
            planned = rules([r for r in records if r["part"] == "calibration"], list(methods))
            print({name: rule.frames_for(TOKENS) for name, rule in planned.items()}, flush=True)
        for index in range(given.held_out if part == "calibration" else given.videos):
            for length in (*((WHOLE,) if part == "condition" else ()), *LENGTHS):
                if any((r["part"], r["index"], r["frames"]) == (part, index, length) for r in records):
                    continue
                start = time.process_time()
                clip = Clip(adapters, processor, LongScene("dense", SEEDS[part], index, length), given.questions)
                frames = {name: rule.frames_for(TOKENS) for name, rule in planned.items()}
                record = {"part": part, "index": index, "frames": length, **measured(clip, part, methods, frames)}
                records.append(record)
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(part, index, length, f"{time.process_time() - start:.0f} s", flush=True)
    frames = {name: rule.frames_for(TOKENS) for name, rule in planned.items()}
    return summary(records, planned, timed(model, processor, methods, frames))


if __name__ == "__main__":
    main()
