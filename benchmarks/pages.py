"""The measured parts of README.md, docs/methods/*.md and some other pages of docs/, from the result files.

Everything between the two comments of a page is replaced. `--check` writes nothing, and fails if a page is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vidsieve import registry
from vidsieve.io.texts import percent
from workbench.testbed.ablating import ablation_table

ROOT = Path(__file__).resolve().parents[1]
OPEN, CLOSE = "<!-- measured -->", "<!-- /measured -->"
RETENTIONS = (0.4, 0.25, 0.1, 0.05, 0.025)
PIPELINES = ("llava-onevision-0.1b", "qwen2.5-vl-0.1b")
GPU = "gpu_scale_h100"
SOURCES = ("methods", "selecting", "retention", "open", "learning", GPU, *(f"pipeline_{name}" for name in PIPELINES))
ENTRIES = ROOT / "docs" / "results" / "leaderboard"
ABOUT = ("README", "open", "pipeline", "leaderboard", "ablations")
"""Pages other than those of methods."""
REFERENCES = {
    "full": "all tokens",
    "first_look": "the question's queries and keys on the LLM's inputs, untrained",
    "question_oracle": "oracle: knows which objects are asked about",
}
BESIDE = {"cacovid": ("full", "first_look"), "score": ("full",)}
"""By page: rows of `REFERENCES` that belong beside the method's own; `full` beside all."""
BESIDE |= {f"train-{name}": (*rows, "question_oracle") for name, rows in BESIDE.items()}
FORMER = {"A": "dense", "B": "dense-b"}
"""By its former name, a world of results that were measured earlier."""

Results = dict[str, dict[str, Any]]
Condition = tuple[str, str]
"""Method, with what was changed of it in brackets, and variant, as result files have them."""


def read_results(folder: Path) -> Results:
    """Return the result files by name, and the leaderboard's entries; a file that is not there yet is empty."""
    paths = {name: folder / f"{name}.json" for name in SOURCES}
    found = {name: json.loads(path.read_text("utf-8")) if path.exists() else {} for name, path in paths.items()}
    ablated = [json.loads(path.read_text("utf-8")) for path in sorted((folder / "ablations").glob("*.json"))]
    entries = {path.stem: read_entry(path) for path in sorted(ENTRIES.glob("*.json"))}
    return {
        **found,
        "ablations": {one["name"]: one for result in ablated for one in result["tables"]},
        "leaderboard": entries,
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(cells)} |" for cells in rows)]


# -- accuracy -----------------------------------------------------------------------------------------------


def conditions(name: str, worlds: dict[str, Any]) -> list[Condition]:
    """Return what was measured of a method, its variants first; of these, only ours with something changed of it."""
    found = dict.fromkeys((row["method"], row["variant"]) for world in worlds.values() for row in world["rows"])
    variants = [(name, variant) for variant in registry.compressors.get(name).variants]
    changed = [row for row in found if row[0].startswith(f"{name}[") and row[1] == "ours"]
    return [row for row in variants if row in found or row[1] == "ours"] + changed


def label(name: str, method: str, variant: str) -> str:
    """Return a condition's name in a table."""
    if method in REFERENCES:
        return REFERENCES[method]
    part = ", outer part" if hasattr(registry.compressors.get(name), "inner") else ""
    return f"`{method}`{part}" + ("" if variant == "ours" else f", variant {variant}")


def accuracy_cell(row: dict[str, Any] | None) -> str:
    """Return accuracy, its standard error, and the difference to random at the same retention."""
    if row is None:
        return "–"
    against = row.get("vs_random")
    difference = f" ({against['mean']:+.3f})" if against and row["method"] != "random" else ""
    return f"{row['mean']:.3f} ± {row['stderr']:.3f}{difference}"


def accuracy(page: str, name: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines about accuracy on the testbed."""
    worlds = {key.split()[1]: found for key, found in result.get("tables", {}).items()}
    asked = ", ".join(f"{world['questions']:,} of world {key}" for key, world in worlds.items())
    yield (
        "**Accuracy on the testbed**, a synthetic world with a tiny model of eight layers trained on it: it says "
        "nothing about real videos ([accuracy.md](../accuracy.md)). Share of questions answered correctly "
        f"({asked or 'none yet'}) ± its standard error, clustered by scene; in brackets the paired difference to "
        "`random`."
    )
    yield ""
    wanted = conditions(name, worlds) + [(other, "-") for other in BESIDE.get(page, ("full",))]
    rows = []
    for key, world in worlds.items():
        by = {(row["method"], row["variant"], row["retention"]): row for row in world["rows"]}
        by |= {(method, "-", at): row for (method, _, at), row in by.items() if method in REFERENCES}
        for method, variant in wanted:
            at = [by.get((method, variant, 1.0 if method == "full" else ratio)) for ratio in RETENTIONS]
            rows.append([f"{key}: {label(name, method, variant)}", *map(accuracy_cell, at)])
    yield from table(["kept", *map(percent, RETENTIONS)], rows)
    yield ""
    variants = [v for v in registry.compressors.get(name).variants if (name, v) not in wanted]
    left_out = "".join(f" Variant `{variant}` was not measured." for variant in variants)
    yield f"–: not measured, or below what the method can keep here.{left_out}"
    if reasons := floors(name, worlds):
        yield from ("", *(f"- {reason}" for reason in reasons))


def floors(name: str, worlds: dict[str, Any]) -> list[str]:
    """Return why a method could not be measured somewhere, each reason once."""
    found = []
    for world in worlds.values():
        for key, reason in world.get("floors", {}).items():
            method = key.partition("/")[0]
            if method.partition("[")[0] == name:
                found.append(f"`{method}`: {reason.partition(': ')[2]}")
    return list(dict.fromkeys(found))


# -- leaderboard --------------------------------------------------------------------------------------------

Name = Annotated[str, Meta(max_length=200, pattern=r"^[^|<>`\[\]\n]*$")]
"""A text that cannot break out of a cell."""
Share = Annotated[float, Meta(ge=0, le=1)]


class Loss(msgspec.Struct):
    """A difference to all tokens, question by question."""

    diff: Annotated[float, Meta(ge=-1, le=1)]
    stderr: Share | None


class Measured(msgspec.Struct):
    """A row of an entry: a method at a retention."""

    method: Name
    variant: Name
    part: Name
    policy: Name
    retention: Annotated[float, Meta(gt=0, le=1)] | Name
    accuracy: Share
    stderr: Share | None
    vs_full: Loss
    layer_retention: Share | None = None
    frames: int | None = None

    @property
    def kept(self) -> tuple[float, str]:
        """Fraction of the tokens that was asked for, of a count what layers saw, and how a table says it."""
        try:
            return float(self.retention), percent(float(self.retention))
        except ValueError:
            return self.layer_retention or 0.0, str(self.retention)


class Setup(msgspec.Struct):
    """What the figures of an entry depend on."""

    model: Annotated[Name, Meta(min_length=1)]
    model_digest: Annotated[Name, Meta(min_length=8)]
    questions: Annotated[int, Meta(ge=1)]
    seed: int
    world: Name = ""


class Entry(msgspec.Struct):
    """The parts of a file that `vidsieve eval … --json` writes which the leaderboard reads."""

    task: Name
    command: Annotated[str, Meta(min_length=1)]
    versions: dict[str, str]
    settings: Setup
    rows: Annotated[list[Measured], Meta(min_length=2)]
    videos: int = 0
    n_scenes: int = 0


def read_entry(path: Path) -> Entry:
    """Return an entry, checked.

    Raises
    ------
    ValueError
        If it is no result of `vidsieve eval`, or its figures contradict each other; the text says what to mend.
    """
    try:
        entry = msgspec.json.decode(path.read_bytes(), type=Entry)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path.name} is no result of `vidsieve eval`: {error}") from None
    tasks = {"testbed", *registry.benchmarks} - {"questions"}
    if entry.task not in tasks:
        raise ValueError(f"{path.name}: task {entry.task!r} is not one that others can repeat ({', '.join(tasks)})")
    if lacking := {"vidsieve", "torch", "transformers"} - entry.versions.keys():
        raise ValueError(f"{path.name}: versions lack {', '.join(sorted(lacking))}")
    if max(entry.videos, entry.n_scenes) < 20:
        raise ValueError(f"{path.name}: fewer than 20 videos, whose errors come out too small: ask more questions")
    full = {row.frames: row.accuracy for row in entry.rows if row.method == "full"}
    seen = set()
    for row in entry.rows:
        what = (row.method, row.variant, row.part, row.policy, row.retention, row.frames)
        if what in seen:
            raise ValueError(f"{path.name}: {row.method} at {row.retention} is there twice")
        seen.add(what)
        if row.frames not in full:
            raise ValueError(f"{path.name}: no row of all tokens beside {row.method} (frames: {row.frames})")
        if abs(row.accuracy - full[row.frames] - row.vs_full.diff) > 1e-6:
            raise ValueError(f"{path.name}: {row.method} at {row.retention}: vs_full is not the accuracies' difference")
    return entry


def leaderboard(entries: dict[str, Entry]) -> Iterator[str]:
    """Yield a table for every task, sorted by what is kept and then by what is left of the accuracy."""
    tasks: dict[str, list[tuple[float, float, list[str]]]] = {}
    for name, entry in entries.items():
        setup = entry.settings
        full = {row.frames: row.accuracy for row in entry.rows if row.method == "full"}
        for row in entry.rows:
            share = row.accuracy / full[row.frames] if full[row.frames] else 0.0
            error = "" if row.stderr is None else f" ± {100 * row.stderr:.1f}"
            half = "" if row.vs_full.stderr is None else f" ± {196 * row.vs_full.stderr:.1f}"
            kept, amount = row.kept
            cells = [
                amount,
                "all tokens" if row.method == "full" else entry_name(row),
                f"{100 * share:.1f}",
                "–" if row.method == "full" else f"{100 * row.vs_full.diff:+.1f}{half}",
                f"{100 * row.accuracy:.1f}{error}",
                f"`{setup.model}`" + (f", {row.frames} frames" if row.frames else ""),
                f"{setup.questions:,}",
                f"[{name}](results/leaderboard/{name}.json)",
            ]
            title = f"{entry.task}, world {setup.world}" if setup.world else entry.task
            tasks.setdefault(title, []).append((kept, share, cells))
    heads = (
        "kept",
        "method",
        "% of all tokens' accuracy",
        "points lost or won, 95 %",
        "accuracy %",
        "model",
        "questions",
    )
    for title in sorted(tasks):
        yield f"## {title}\n"
        yield from table(
            (*heads, "entry"), [cells for _, _, cells in sorted(tasks[title], key=lambda row: (-row[0], -row[1]))]
        )
        yield ""


def entry_name(row: Measured) -> str:
    """Return a row's method, with its variant, part and policy."""
    more = [] if row.variant in ("ours", "-") else [row.variant]
    more += [text for text in (row.part, row.policy) if text]
    return f"`{row.method}`" + (f" ({', '.join(more)})" if more else "")


# -- selecting ----------------------------------------------------------------------------------------------


def milliseconds(row: dict[str, Any], grid: str, form: str) -> str:
    """Return the median of some runs, if there were any."""
    found = row.get("seconds", {}).get(grid, {}).get(form)
    if found is None:
        return "–"
    median = 1e3 * found["median"]
    return f"{median:.3g}" if median < 100 else f"{median:,.0f}"


def mebibytes(row: dict[str, Any], grid: str, form: str) -> str:
    """Return the memory that selecting adds, if it was measured."""
    found = row.get("extra_MiB", {}).get(grid if form == "ours" else f"{grid}, published form")
    return "–" if found is None else f"{found:,.0f}"


def selecting(name: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines about time and memory of selecting alone."""
    every, machine = result.get("rows", {}), result.get("machine", {})
    rows = {key: row for key, row in every.items() if key.partition(",")[0] == name}
    if not rows:
        yield "**Selecting alone** has not been measured."
        return
    grids = list(dict.fromkeys(grid for row in every.values() for grid in row.get("seconds", {})))
    yield (
        f"**Selecting alone**: medians in milliseconds on {machine.get('threads', '–')} threads of "
        f"{machine.get('processor', '–')}, and MiB of memory in addition to the tokens "
        "([selecting.md](../selecting.md) says how much is kept). *published*: a plain transcription of the release's "
        "steps."
    )
    yield ""
    # Published forms are measured on the first grid only.
    columns = [(grid, "ours") for grid in grids] + [(grid, "published") for grid in grids[:1]]
    heads = [grid if form == "ours" else f"{form}, {grid}" for grid, form in columns]
    yield from table(
        ["method", *(f"ms, {head}" for head in heads), *(f"MiB, {head}" for head in heads)],
        [
            [f"`{key}`", *(milliseconds(row, *column) for column in columns), *(mebibytes(row, *c) for c in columns)]
            for key, row in rows.items()
        ],
    )


# -- retention ----------------------------------------------------------------------------------------------


def kept_cell(row: dict[str, Any] | None) -> str:
    """Return what is left after the last stage, and what layers see on average."""
    if row is None or "refused" in row:
        return "–"
    read = "" if row["decoded"] is None else f" ({row['decoded']:.2f} of them read)"
    return f"{row['real']:.4f} / {row['layers']:.4f}{read}"


def kept(name: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines about nominal and real retention; none of a method with a policy, which keeps the budget."""
    settings, ratios = result.get("kept", {}), result.get("retentions", [])
    labels = [key for rows in settings.values() for key in rows if key.partition(",")[0].partition(":")[0] == name]
    if not labels:
        return
    yield (
        "**What is kept** at a nominal retention: the share of tokens kept after the last stage / the mean over the "
        "LLM's layers ([retention.md](../retention.md))."
    )
    yield ""
    heads = [f"{title.partition(':')[0].lower()}, {percent(ratio)}" for title in settings for ratio in ratios]
    rows = []
    for key in dict.fromkeys(labels):
        found = [by_label.get(key, {}).get(str(ratio)) for by_label in settings.values() for ratio in ratios]
        rows.append([f"`{key}`", *map(kept_cell, found)])
    yield from table(["method", *heads], rows)
    yield ""
    if any("–" in row for row in rows):
        yield "–: cannot keep so little; [retention.md](../retention.md) has the reasons."


# -- pages --------------------------------------------------------------------------------------------------


def block(page: str, results: Results) -> str:
    """Return the measured part of a page: a method's, or of ``train-NAME`` what its policies reach."""
    if page == "README":
        return "\n" + "\n".join(five_numbers(results)) + "\n"
    if page == "open":
        return "\n" + "\n".join(open_tasks(results["open"]))
    if page == "pipeline":
        return "\n" + "\n".join(pipeline(results))
    if page == "leaderboard":
        return "\n" + "\n".join(leaderboard(results["leaderboard"]))
    if page == "ablations":
        return "\n" + "\n\n".join(ablation_table(one).to_markdown() for one in results["ablations"].values()) + "\n"
    name = page.removeprefix("train-")
    lines = ["", *accuracy(page, name, results["methods"]), ""]
    if name == page:
        lines += [*selecting(name, results["selecting"]), "", *kept(name, results["retention"]), ""]
    return "\n".join(lines)


# -- pages of their own -------------------------------------------------------------------------------------


def five_numbers(results: Results) -> Iterator[str]:
    """Yield the README's table: time and memory on a GPU, accuracy on the testbed."""
    gpu, learned = results[GPU], results["learning"]
    if not (gpu and learned):
        yield "–"
        return
    shares = (1.0, 0.25, 0.1)
    prefill = {row["retention"]: row for row in gpu["prefill"]}
    wanted = ("llava_onevision", 64, "cuda")
    first = {
        row["retention"]: row["first_token_ms"]["median"]
        for row in gpu["first_token"]
        if (row["family"], row["frames"], row["preprocess_on"]) == wanted
    }
    right = {
        (row["method"], row["retention"]): f"{row['mean']:.3f}"
        for row in learned["tables"]["deep dense"]["rows"]
        if row["variant"] in ("ours", "-")
    }
    full = right["full", 1.0]
    times = [f"{prefill[share]['select_and_prefill_ms']['median']:,.0f} ms" for share in shares]
    rows = [
        ("Selection and prefill of Qwen2.5-VL-7B, 128 frames, H100", *times),
        ("Memory for it, beyond the weights", *(f"{prefill[share]['peak_GiB']:.1f} GiB" for share in shares)),
        ("Time to first token, LLaVA-OneVision-7B, 64 frames, H100", *(f"{first[share]:,.0f} ms" for share in shares)),
        *(
            (f"Correct answers on the testbed, `{name}`, {how}", full, *(right[name, share] for share in shares[1:]))
            for name, how in (("cacovid", "trained"), ("divprune", "untrained"))
        ),
    ]
    yield from table(("", "all tokens", "25 % kept", "10 % kept"), rows)


def open_tasks(result: dict[str, Any]) -> Iterator[str]:
    """Yield what every method is worth at tasks beyond multiple choice, and what it loses, by world."""
    for world, part in result.get("worlds", {}).items():
        names = list(part["rows"][0]["tasks"])
        name = FORMER.get(world, world)
        yield f"**World {name}**, {part['scenes']} scenes, % ± standard error, clustered by scene:\n"
        yield from table(
            ("kept", *names), [(row_name(row), *task_cells(row, "mean", "stderr")) for row in part["rows"]]
        )
        yield "\nThe loss: percentage points against all tokens, paired by scene, with 95 % intervals.\n"
        lost = [row for row in part["rows"] if row["method"] != "full"]
        yield from table(("kept", *names), [(row_name(row), *task_losses(row)) for row in lost])
        for row in part["refused"]:
            yield f"\n`{row['method']}` at {percent(float(row['retention']))}: {row['reason']}"
        yield ""


def row_name(row: dict[str, Any]) -> str:
    """Return a condition as tables call it."""
    if row["method"] == "full":
        return "all tokens"
    variant = "" if row["variant"] == "ours" else f", {row['variant']}"
    return f"`{row['method']}`{variant}, {percent(float(row['retention']))}"


def task_cells(row: dict[str, Any], value: str, error: str) -> list[str]:
    """Return a condition's shares at every task."""
    return [f"{100 * task[value]:.1f} ± {100 * task[error]:.1f}" for task in row["tasks"].values()]


def task_losses(row: dict[str, Any]) -> list[str]:
    """Return a condition's differences to all tokens; what is within its interval is in brackets."""
    cells = []
    for task in row["tasks"].values():
        gap, half = 100 * task["vs_full"]["diff"], 196 * task["vs_full"]["stderr"]
        text = f"{gap:+.1f} ± {half:.1f}"
        cells.append(text if abs(gap) > half else f"({text})")
    return cells


PARTS = {
    "read video": ("decode",),
    "preprocess": ("preprocess",),
    "encode": ("vision encoder", "projector"),
    "select": ("select",),
    "prefill": ("prefill",),
    "generate": ("decode-text",),
    "total": ("all",),
}
"""Parts of the pipeline, and what the files of results that were written before name them."""


def parts(ms: dict[str, Any]) -> dict[str, float]:
    """Return the medians of the parts of a row."""
    if "total" in ms:
        return {part: ms[part]["p50"] for part in PARTS}
    return {part: sum(ms[name]["p50"] for name in names) for part, names in PARTS.items()}


def pipeline(results: Results) -> Iterator[str]:
    """Yield where the time goes with all tokens and with fewer, and the prefill's gain beside that of operations."""
    for name in PIPELINES:
        result = results[f"pipeline_{name}"]
        if not result:
            continue
        machine = result["machine"]
        yield (
            f"**{name}**, random weights, {result['lengths'][0]} frames, {result['dtype']}, {machine['threads']} "
            f"threads of {machine['processor']}, medians of {result['repeats']} rounds, in milliseconds:\n"
        )
        heads = ("kept", "tokens", *PARTS, "LLM's operations, fewer", "prefill speedup", "total speedup")
        full, rows = result["rows"][0], []
        for row in result["rows"]:
            ms, before = parts(row["ms"]), parts(full["ms"])
            fewer = full["flops"]["counted"] / row["flops"]["counted"]
            faster = (f"{x:.2f}×" for x in (fewer, *(before[part] / ms[part] for part in ("prefill", "total"))))
            spent = (f"{value:,.0f}" for value in ms.values())
            rows.append((row_name(row), f"{row['visual'][1]:,.0f}", *spent, *faster))
        yield from table(heads, rows)
        yield ""


def inserted(text: str, made: str) -> str:
    """Return a page with another measured part.

    Raises
    ------
    ValueError
        If it has not exactly one place for it.
    """
    before, opened, rest = text.partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if not (opened and closed) or OPEN in after or CLOSE in after:
        raise ValueError(f"a page has one {OPEN} and behind it one {CLOSE}")
    return f"{before}{OPEN}\n{made}\n{CLOSE}{after}"


def pages(folder: Path) -> list[Path]:
    """Return the pages that have a measured part: of every method, and of what trains them."""
    trained = [f"train-{name}" for name in registry.compressors if registry.compressors.get(name).trained]
    own = [(folder.parents[1] if page == "README" else folder.parent) / f"{page}.md" for page in ABOUT]
    return [*(folder / f"{page}.md" for page in (*registry.compressors, *trained)), *own]


def outdated(folder: Path, results: Results) -> dict[Path, str]:
    """Return the pages that are not up to date, and what they should be."""
    found = {}
    for path in pages(folder):
        text = path.read_text("utf-8")
        made = inserted(text, block(path.stem, results))
        if made != text:
            found[path] = made
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--pages", type=Path, default=ROOT / "docs" / "methods")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not up to date")
    options = parser.parse_args()
    found = outdated(options.pages, read_results(options.results))
    for path, text in found.items():
        print(f"{path.name} {'is not up to date' if options.check else 'written'}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    if options.check and found:
        sys.exit("run `python benchmarks/pages.py`")


if __name__ == "__main__":
    main()
