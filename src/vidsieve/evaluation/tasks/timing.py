"""Time the full pipeline, file to answer, for every method and the unpruned model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import on_device
from vidsieve.answering import PARTS, Clock, Generated, generated, read
from vidsieve.errors import BudgetError, EvaluationError, NeedError, StageError, UnsupportedCallError
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import Measurement, Results
from vidsieve.evaluation.flops import paper_flops, prefill_flops
from vidsieve.evaluation.table import NONE, Table, named
from vidsieve.io.faults import contained
from vidsieve.io.machine import machine, peak_memory
from vidsieve.video.reading import Video

Prompts = Callable[[Video], Mapping[str, Tensor]]
"""Makes the model's inputs from a video's frames."""


@dataclass(kw_only=True)
class TimingTask:
    """Passes from a video to an answer; conditions take turns, so that other load on the machine falls on all alike.

    A unit is a counted round at one length, and not a cluster: its table has no statistics over clusters.

    Parameters
    ----------
    adapter : of the model
    source : Path or Video
        A file, which every pass reads, or frames that are read already.
    lengths : sequence of int
        Frames taken of the file; a repeated length is weighted accordingly.
    prompts : callable
    repeats : int
        Counted rounds.
    warm_up : int
        Rounds before them, run once in every process that measures.
    new_tokens : int
        Tokens of every answer, exactly.
    seed : int
    about : mapping
        Further settings for ``run.json`` and the result: model, dtype, attention, device, video.
    """

    adapter: Adapter
    source: Path | Video
    lengths: Sequence[int]
    prompts: Prompts
    repeats: int = 3
    warm_up: int = 1
    new_tokens: int = 8
    seed: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    name: str = "timing"
    form: ClassVar = (
        ("item", Annotated[str, msgspec.Meta(pattern="^[0-9]+$")]),
        ("ms", Annotated[dict[Literal[PARTS], float], msgspec.Meta(min_length=len(PARTS))]),  # type: ignore[valid-type]
        *(("visual", tuple[int, int]), ("prompt", tuple[int, int])),
        *(("layers", float), ("seen", int), ("peak", int)),
    )

    def settings(self) -> dict[str, Any]:
        """Return the settings that records depend on."""
        rounds = {"lengths": list(self.lengths), "repeats": self.repeats, "new_tokens": self.new_tokens}
        return {**rounds, "seed": self.seed, **self.about, "machine": machine()}

    def units(self) -> list[str]:
        """Return ``round/place`` of every counted round and length."""
        return [f"{turn}/{place}" for turn in range(self.repeats) for place in range(len(self.lengths))]

    @torch.no_grad()
    def measure(self, unit: str, conditions: Sequence[Condition]) -> list[Measurement]:
        """Return one pass of every condition at one length; the item is its place."""
        while self.warm_up:
            self.warm_up -= 1
            for place in range(len(self.lengths)):
                self._turns(place, conditions)
        return self._turns(int(unit.partition("/")[2]), conditions)

    def _turns(self, place: int, conditions: Sequence[Condition]) -> list[Measurement]:
        records, refused = [], dict[str, str]()
        for condition in conditions:
            with contained(refused, condition.key, BudgetError, NeedError, StageError, UnsupportedCallError):
                records.append(Measurement(str(place), condition.key, self.once(self.lengths[place], condition)))
        return records + [Measurement(condition=key, reason=reason) for key, reason in refused.items()]

    def once(self, frames: int, condition: Condition) -> dict[str, Any]:
        """Return one pass, as `one_pass` does, with ``peak``, the bytes of memory at the most."""
        device = self.adapter.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            peak_memory(reset=True)
        values, _ = one_pass(self, frames, condition)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
        return {**values, "peak": int(peak)}

    def tabulate(self, results: Results) -> Table:
        """Return the table of times.

        The result has the settings, ``rows`` and ``refused``; per row what the condition is, and: ``ms``, per part and
        ``total`` ``{mean, sd, p50, p95, min, max}`` (mean and sd over lengths, of each one's median; others over all
        runs), ``by_length``, ``visual``, ``prompt`` (before and after, means over lengths), ``flops`` (the papers'
        formula and our count), ``peak_MiB``, ``times_faster`` (prefill with selection, and total) and ``break_even``:
        the fewest frames from which the total is less than with all tokens; None: never.

        Raises
        ------
        EvaluationError
            If the first condition, which others are compared with, is refused.
        """
        rows = time_rows(results, self.lengths)
        text = self.adapter.model.config.get_text_config()
        for condition, row in zip(results.measured, rows, strict=True):
            runs = results.turns(condition.key)
            one = list({run["item"]: run for run in runs}.values())  # tokens do not differ from run to run
            counts = [(paper_flops(text, run["seen"]), prefill_flops(text, run["seen"])) for run in one]
            row["visual"], row["prompt"] = (
                np.mean([run[name] for run in one], axis=0).tolist() for name in ("visual", "prompt")
            )
            row["flops"] = dict(zip(("paper", "counted"), np.mean(counts, axis=0).tolist(), strict=True))
            row["layer_retention"] = statistics.mean(run["layers"] for run in one)
            row["peak_MiB"] = max(run["peak"] for run in runs) / 2**20
            row["times_faster"] = {
                "prefill": _llm(rows[0]) / _llm(row),
                "total": rows[0]["ms"]["total"]["mean"] / row["ms"]["total"]["mean"],
            }
            row["break_even"] = _break_even(rows[0], row)
        return timing_table({**self.settings(), "rows": rows, "refused": results.refused_rows()})


@dataclass(kw_only=True)
class ComparingTask(TimingTask):
    """One question about one video under every method: what each keeps, answers and costs.

    Parameters
    ----------
    processor : of the model
    scores : dict
        Filled with the scores (N,) of the video's tokens by condition, of methods before the LLM that have them.
    """

    processor: Any
    scores: dict[str, Tensor] = field(default_factory=dict, repr=False)
    name: str = "comparing"

    def once(self, frames: int, condition: Condition) -> dict[str, Any]:
        """Return one pass, as `one_pass` does, with ``answer`` and ``videos``, what was kept of each."""
        values, run = one_pass(self, frames, condition, exactly=False)
        scores = run.plan.selections[0].scores
        if scores is not None:
            self.scores[condition.key] = scores.float().cpu()
        short = run.plan.inputs["input_ids"].shape[1]
        text = self.processor.batch_decode(run.ids[:, short:], skip_special_tokens=True)[0].strip()
        return {**values, "answer": text, "videos": [trace.as_dict() for trace in run.plan.traces]}

    def tabulate(self, results: Results) -> Table:
        """Return the table of answers.

        The result has the settings, ``frames, grid, tokens, rows, refused``; per row ``name, key, method, variant,
        part, acts, retention, real_retention, layer_retention, decode_share, indices, answer, same`` (as with all
        tokens), ``prompt, ms``.

        Raises
        ------
        EvaluationError
            If the model does not answer with all tokens.
        """
        rows = time_rows(results, self.lengths)
        everything, grid = results.turns(results.conditions[0].key)[0], None
        for condition, row in zip(results.measured, rows, strict=True):
            run = results.turns(condition.key)[0]
            trace = run["videos"][0] if run["videos"] else {}
            grid = grid or trace.get("grid")
            row |= {name: trace.get(name, 1.0) for name in ("real_retention", "layer_retention")}
            row |= {name: trace.get(name) for name in ("decode_share", "indices")}
            row |= {"name": name_of(row), "key": condition.key, "prompt": run["prompt"], "answer": run["answer"]}
            row["acts"] = "-" if condition.method is None else condition.method.acts.value
            row["same"] = run["answer"] == everything["answer"]
        refused = [{"name": name_of(row), **row} for row in results.refused_rows()]
        about = {"frames": self.lengths[0], "grid": grid, "tokens": grid and math.prod(grid)}
        return comparison_table({**self.settings(), **about, "rows": rows, "refused": refused})


def one_pass(
    task: TimingTask, frames: int, condition: Condition, *, exactly: bool = True
) -> tuple[dict[str, Any], Generated]:
    """Time one pass from a video to an answer of exactly, or at most, so many tokens as the task has.

    Returns
    -------
    dict
        ``ms`` of every part, ``visual, prompt`` (tokens before and after), ``layers`` (the fraction of video tokens
        that layers see on average), ``seen`` (tokens that layers see on average, text included).
    Generated

    Raises
    ------
    BudgetError, NeedError, StageError, UnsupportedCallError
        If the method cannot run on this model, or keep so little.
    """
    adapter, method, clock = task.adapter, condition.method, Clock()
    video, device = task.source, adapter.device
    if method is not None:
        adapter.check(method)
    if isinstance(video, Path):
        video = read(video, clock, frames=frames, fps=None, max_frames=None)
    with clock.part("preprocess", device):
        inputs = on_device(task.prompts(video), device)
    with clock.part("encode", device):
        encoded = adapter.encode_for(inputs, method)
    run = generated(adapter, encoded, method, clock, tokens=task.new_tokens, seed=task.seed, exactly=exactly)
    traces = run.plan.traces
    total = sum(span.features.prompted.num_tokens for span in encoded.videos)
    before, after = int(encoded.input_ids.shape[1]), int(run.plan.inputs["input_ids"].shape[1])
    layers = sum(trace.layer_retention * trace.total for trace in traces) / total if traces else 1.0
    # Methods inside the LLM begin with more tokens and end with fewer.
    inside = bool(traces) and traces[0].held is not None
    values = {
        "ms": {part: clock.ms.get(part, 0.0) for part in PARTS},
        "visual": [total, sum(trace.kept for trace in traces) if traces else total],
        "prompt": [before, after],
        "layers": layers,
        "seen": round(before - total + layers * total) if inside else after,
    }
    return values, run


def time_rows(results: Results, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Return for every condition its description, ``ms`` and ``by_length``.

    Raises
    ------
    EvaluationError
        If the first condition, which others are compared with, is refused.
    """
    first = results.conditions[0].key
    if first in results.refused:
        raise EvaluationError(f"nothing to compare with: {results.refused[first][0]}")
    rows = []
    for condition in results.measured:
        runs: dict[int, list[Mapping[str, Any]]] = {}
        for run in results.turns(condition.key):
            runs.setdefault(int(run["item"]), []).append(run)
        spent = {part: {place: [run["ms"][part] for run in some] for place, some in runs.items()} for part in PARTS}
        spent["total"] = {place: [sum(run["ms"].values()) for run in some] for place, some in runs.items()}
        by_length = [
            {
                "frames": lengths[place],
                "visual": some[0]["visual"],
                "prompt": some[0]["prompt"],
                "ms": {part: statistics.median(values[place]) for part, values in spent.items()},
            }
            for place, some in runs.items()
        ]
        described = {name: value for name, value in condition.described().items() if name != "frames"}
        rows.append({**described, "ms": {p: _spread(values) for p, values in spent.items()}, "by_length": by_length})
    return rows


def _spread(values: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """Return mean and standard deviation over lengths of each one's median, the others over all runs."""
    medians = [statistics.median(runs) for runs in values.values()]
    every = sorted(ms for runs in values.values() for ms in runs)
    return {
        "mean": statistics.mean(medians),
        "sd": statistics.stdev(medians) if len(medians) > 1 else 0.0,
        "p50": statistics.median(every),
        "p95": every[math.ceil(0.95 * len(every)) - 1],
        "min": every[0],
        "max": every[-1],
    }


def _llm(row: Mapping[str, Any]) -> float:
    """Return the mean milliseconds of selecting and of the prefill."""
    return float(row["ms"]["select"]["mean"] + row["ms"]["prefill"]["mean"])


def _break_even(first: Mapping[str, Any], row: Mapping[str, Any]) -> int | None:
    """Return the fewest frames at which, and at all more, the total is less than with all tokens."""
    saved: dict[int, bool] = {}
    for whole, pruned in zip(first["by_length"], row["by_length"], strict=True):
        saved[pruned["frames"]] = saved.get(pruned["frames"], True) and pruned["ms"]["total"] < whole["ms"]["total"]
    fewest = None
    for frames in sorted(saved, reverse=True):
        if not saved[frames]:
            break
        fewest = frames
    return fewest


def name_of(row: Mapping[str, Any]) -> str:
    """Return the name of a described condition without its part, as the command line has it."""
    return str(row["policy"] or named({**row, "part": ""}))


# -- tables -----------------------------------------------------------------------------------------------------------


def timing_table(result: Mapping[str, Any]) -> Table:
    """Return the tables of a timing's result: milliseconds of every part, and the LLM's work."""
    full, times, work = result["rows"][0], [], []
    for row in result["rows"]:
        known, ms, flops = (named(row), row["retention"]), row["ms"], row["flops"]
        pays = NONE if row is full else row["break_even"] or "no"
        faster = [f"{row['times_faster'][part]:.2f}×" for part in ("prefill", "total")]
        times.append([*known, *(f"{p['mean']:.1f}" for p in ms.values()), *faster, pays, f"{row['peak_MiB']:.0f}"])
        tokens = [f"{row[name][1]:.0f}" for name in ("visual", "prompt")]
        counts = [f"{flops[way] / 1e12:.4g}" for way in ("paper", "counted")]
        fewer = full["flops"]["counted"] / flops["counted"]
        prefill = full["ms"]["prefill"]["mean"] / ms["prefill"]["mean"]
        spent = [f"{ms['total'][which]:.0f}" for which in ("p50", "p95")]
        work.append([*known, *tokens, *counts, f"{fewer:.2f}×", f"{prefill:.2f}×", *spent])
    about = ", ".join(str(result[key]) for key in ("model", "device", "dtype", "attention") if key in result)
    title = f"{about}, {', '.join(map(str, result['lengths']))} frames: ms, means over lengths"
    note = (
        "speedup: against all tokens, of select + prefill and of the total; break-even: the fewest frames from which "
        "the total is less"
    )
    columns = ("method", "kept", *full["ms"], "prefill speedup", "total speedup", "break-even", "MiB")
    flops_columns = ("TFLOP, papers' formula", "TFLOP, counted", "fewer", "prefill speedup", "total p50 ms", "p95")
    heads = ("method", "kept", "video tokens", "prompt", *flops_columns)
    return Table.of_result(title, columns, times, result, notes=[note], more=[Table("The LLM's work", heads, work)])


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a comparison's result."""
    whole = result["rows"][0]["ms"]["total"]["p50"]
    cells: list[Sequence[Any]] = []
    for row in result["rows"]:
        ms, kept = row["ms"], [f"{row[name]:.3f}" for name in ("layer_retention", "real_retention")]
        spent = [f"{ms[part]['p50']:.1f}" for part in ("select", "prefill", "total")]
        answer = f"{'=' if row['same'] else '≠'} {row['answer']}"
        speedup = f"{whole / ms['total']['p50']:.2f}×"
        cells.append((row["name"], answer, *kept, *spent, speedup))
    tokens = f", {result['tokens']} video tokens" if result["tokens"] else ""
    title = f"{result['frames']} frames{tokens}; medians of {result['repeats']} rounds, without reading the video"
    columns = (
        *("method", "answer (= all tokens')", "mean kept over layers", "kept after the last layer"),
        *("select ms", "prefill ms", "total ms", "speedup"),
    )
    return Table.of_result(title, columns, cells, result, texts=frozenset({0, 1}))
