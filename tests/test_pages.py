"""The pages of docs/: every method has one, and what they say of arguments, commands, results and each other holds."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from vidsieve import registry
from vidsieve.cli.main import method_rows
from vidsieve.training.settings import CONFIGS, SETTINGS

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
PAGES = sorted(METHODS.glob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = ("Paper", "What it does", "What differs here", "Arguments", "Use", "Measured", "What to watch")
WRITTEN = ("accuracy", "calls", "families", "learning", "retention", "selecting", "encoder")
"""Pages that are written by a benchmark from top to bottom."""


def section(path, name):
    """Return what stands under a heading of the second level."""
    return path.read_text("utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def rows(text):
    """Return the cells of all rows of a table but its head, without the quotes of code."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def slug(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def measuring():
    """Return benchmarks/pages.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_pages", ROOT / "benchmarks" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # msgspec looks up annotations there
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page():
    trained = [f"train-{row['name']}" for row in method_rows() if row["trained"]]
    # AutoGaze reads pixels, which adapters do not hand over: it is an API of its own.
    named = {"README", "autogaze", *registry.compressors, *registry.fronts, *trained}
    assert {path.stem for path in PAGES} == named


@pytest.mark.parametrize("name", list(registry.compressors))
def test_a_page_has_its_sections_and_its_arguments_are_the_method_s(name):
    path = METHODS / f"{name}.md"
    assert tuple(re.findall(r"^## (.*)$", path.read_text("utf-8"), re.MULTILINE)) == SECTIONS
    fields = dataclasses.fields(registry.compressors.get(name))
    said = [row[:2] for row in rows(section(path, "Arguments"))]
    assert said == [[field.name, repr(field.default)] for field in fields if field.name != "ahead"]


def test_the_training_page_lists_every_setting_with_its_default_option_and_help():
    table = [row for row in rows((ROOT / "docs" / "training.md").read_text("utf-8")) if len(row) == 4]
    for config in CONFIGS.values():
        for field in dataclasses.fields(config):
            option = f"--{field.name.replace('_', '-')}" if field.metadata["option"] else ""
            assert [field.name, str(field.default), option, field.metadata["help"]] in table


@pytest.mark.parametrize(("method", "config"), CONFIGS.items(), ids=list(CONFIGS))
def test_a_trainer_s_page_has_its_variants_and_metrics(method, config):
    path = METHODS / f"train-{method}.md"
    text = section(path, "What differs here")
    variants = [cell.strip() for cell in text.strip().splitlines()[0].strip("|").split("|")][1:]
    changed = {variant: dict(SETTINGS[method, variant]) for variant in variants}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    wanted = {key: [str((defaults | changed[v])[key]) for v in variants] for key in set().union(*changed.values())}
    assert set(variants) == {variant for name, variant in SETTINGS if name == method}
    assert {key: values for key, *values in rows(text)} == wanted
    source = "".join(file.read_text("utf-8") for file in (ROOT / "src" / "vidsieve" / "training").glob("*.py"))
    metrics = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", section(path, "Metrics"), re.MULTILINE)))
    assert metrics and all(f'"{metric}"' in source for metric in metrics)
    own = (ROOT / "src" / "vidsieve" / "training" / f"{method}.py").read_text("utf-8")
    logged = set(re.findall(r'"(\w+)": ', own)) | set(re.findall(r'(?:figures|metrics)\["(\w+)"\]', own))
    assert logged - {"packing", "params", "lr", "tokens", "frames", "one", "full"} <= set(metrics)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.is_relative_to(ROOT) and target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_measured_parts_are_up_to_date():
    pages = measuring()
    late = pages.outdated(METHODS, pages.read_results(ROOT / "benchmarks" / "results"))
    assert not late, f"run `python benchmarks/pages.py`: {', '.join(path.name for path in late)}"


def test_measured_parts_need_no_result_to_be_there():
    pages = measuring()
    for name in (*registry.compressors, "train-cacovid"):
        assert "–" in pages.block(name, {source: {} for source in pages.SOURCES})


ENTRY = {
    "task": "testbed",
    "command": "vidsieve eval testbed",
    "versions": {"vidsieve": "0.1.0", "torch": "2.14", "transformers": "5.24"},
    "n_scenes": 21,
    "settings": {"model": "testbed", "model_digest": "b894982c", "questions": 480, "seed": 9001, "world": "dense"},
    "rows": [
        {
            "method": method,
            "variant": "ours",
            "part": "",
            "policy": "",
            "retention": retention,
            "accuracy": accuracy,
            "stderr": 0.01,
            "vs_full": {"diff": round(accuracy - 0.8, 6), "stderr": 0.01},
        }
        for method, retention, accuracy in (
            ("uniform", 0.1, 0.4),
            ("full", 1.0, 0.8),
            ("divprune", "0.25", 0.6),
            ("score", 0.25, 0.7),
        )
    ],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry: entry["rows"][0].update(accuracy=1.2), r"Expected `float` <= 1.0 - at `\$.rows\[0\].accuracy`"),
        (
            lambda entry: entry["rows"][0].update(accuracy=0.5),
            "uniform at 0.1: vs_full is not the accuracies' difference",
        ),
        (lambda entry: entry["rows"][0].update(method="a|b"), "matching regex"),
        (lambda entry: entry["rows"].pop(1), "no row of all tokens beside uniform"),
        (lambda entry: entry["rows"].append(entry["rows"][0]), "uniform at 0.1 is there twice"),
        (lambda entry: entry["versions"].pop("torch"), "versions lack torch"),
        (lambda entry: entry.update(n_scenes=19), "fewer than 20 videos"),
        (lambda entry: entry["settings"].pop("model_digest"), "missing required field `model_digest`"),
        (lambda entry: entry.update(task="questions"), "not one that others can repeat"),
    ],
)
def test_what_is_wrong_with_a_leaderboard_entry_is_told(change, said, tmp_path):
    entry = copy.deepcopy(ENTRY)
    path = tmp_path / "someone.json"
    path.write_text(json.dumps(entry))
    assert measuring().read_entry(path).settings.world == "dense"
    change(entry)
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=said):
        measuring().read_entry(path)


def test_the_leaderboard_is_sorted_by_task_and_retention(tmp_path):
    pages = measuring()
    entries = {}
    for name, task in (("one", "testbed"), ("two", "videomme")):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**ENTRY, "task": task}))
        entries[name] = pages.read_entry(path)
    text = "\n".join(pages.leaderboard(entries))
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["testbed, world dense", "videomme, world dense"]
    found = [row[:5] for row in rows(text.partition("## videomme")[0])]
    assert found == [
        ["100 %", "all tokens", "100.0", "–", "80.0 ± 1.0"],
        ["25 %", "score", "87.5", "-10.0 ± 2.0", "70.0 ± 1.0"],
        ["25 %", "divprune", "75.0", "-20.0 ± 2.0", "60.0 ± 1.0"],
        ["10 %", "uniform", "50.0", "-40.0 ± 2.0", "40.0 ± 1.0"],
    ]


def test_entries_of_the_leaderboard_are_small_files():
    files = list(measuring().ENTRIES.iterdir())
    assert files and all(re.fullmatch(r"[\w.-]+\.json", path.name) and path.stat().st_size < 2**18 for path in files)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_narrow_and_names_no_folder_of_this_machine(path):
    text = path.read_text("utf-8")
    prose = "" if path.stem in WRITTEN else re.sub(r"<!-- measured.*?<!-- /measured", "", text, flags=re.DOTALL)
    assert not [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not re.search(r"(?<![\w./])/(home|work|tmp|root)/", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lists_and_tables_look_the_same_on_the_site_and_on_github(path):
    """The site's Markdown wants an empty line before a list or a table, and nested items four blanks in."""
    lines = re.sub(r"```.*?```", "```", path.read_text("utf-8"), flags=re.DOTALL).splitlines()
    item = re.compile(r"( *)([-*]|\d+\.) ")
    for before, line in pairwise(lines):
        found = item.match(line)
        assert not found or len(found[1]) % 4 == 0, line
        if before.strip() and not before.startswith(" "):
            assert not found or item.match(before), line
            assert not line.startswith("|") or before.startswith("|"), line
        assert before.strip() or found or not re.match(r" {1,3}\S", line), line
    for paragraph in "\n".join(lines).split("\n\n"):
        first, *rest = paragraph.strip("\n").split("\n")
        assert item.match(first) or not any(map(item.match, rest)), rest


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150 and lines.index("```python") < 40


def test_functions_that_the_architecture_names_are_where_it_says():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = re.findall(r"\[`(\w+(?:\.\w+)?)`\]\(\.\./(src/\S+?\.py)\)", text)
    assert len(named) > 40
    for name, place in named:
        if name.endswith(".py"):
            continue
        body = ast.parse((ROOT / place).read_text("utf-8")).body
        for part in name.split("."):
            (node,) = (node for node in body if getattr(node, "name", None) == part)
            body = node.body
