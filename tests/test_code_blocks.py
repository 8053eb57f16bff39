"""Every code block of the documents: Python and commands run, and what a block shows as output is what it prints.

A block whose first line is a comment that begins with "Needs" or "Takes" is not run: it is compiled, its commands are
parsed, and the names and options in it must exist. Blocks of a page share their names and a folder; pages other than
the first begin with the names of "Start here".
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import pytest
import typer
import yaml

import vidsieve
from vidsieve import registry
from vidsieve.cli.main import app
from vidsieve.registry import check_known
from workbench.__main__ import app as workbench

ROOT = Path(__file__).parents[1]
START = ROOT / "docs" / "README.md"
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "recipes/README.md")
DOCUMENTS = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# (Needs|Takes) [^\n]+\.\n")
COMMANDS = {"vidsieve": typer.main.get_command(app), "workbench": typer.main.get_command(workbench)}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


def blocks(path):
    """Return the language and the text of every block of a page."""
    return FENCED.findall(path.read_text("utf-8"))


def commands(text):
    """Yield the words of every command of a shell block, without comments and variables set for it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            yield [word for word in command if word != "…" and not re.match(r"[A-Z_]+=", word)]


def check_command(name, words):
    """Walk to a command; its options and number of arguments must be its own, and its methods be there."""
    command = COMMANDS[name]
    while hasattr(command, "commands") and words:
        found = command.commands.get(words[0])
        assert found is not None, f"no such command: {' '.join(words)}"
        command, words = found, words[1:]
    context = command.make_context(name, [], resilient_parsing=True)
    given, rest, _ = command.make_parser(context).parse_args(list(words))
    assert not rest or context.allow_extra_args, f"{command.name}: too many arguments: {rest}"
    missing = [one.name for one in command.params if one.required and given.get(one.name) is None]
    assert not missing, f"{command.name}: {missing} missing in {' '.join(words)}"
    for method in str(given.get("methods") or given.get("method") or "").split(","):
        if method not in ("", "all", "full") and "/" not in method and method.islower():
            check_known(method)


def check_other(words):
    """Check a command that tests do not run: its files, targets, extras and options."""
    text = " ".join(words)
    for program in ("vidsieve", "workbench"):
        if program in words[:1] or ["-m", program] in [words[i : i + 2] for i in range(len(words))]:
            check_command(program, words[words.index(program) + 1 :])
            return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), text
    elif words[0].endswith("pip"):
        asked = re.findall(r"\[([\w,-]+)\]", text)
        assert {extra for names in asked for extra in names.split(",")} <= set(EXTRAS), text
    elif script := next((word for word in words if re.match(r"(benchmarks|recipes)/", word)), None):
        source = (ROOT / script).read_text("utf-8")
        if script.endswith(".sh"):
            source += (ROOT / "recipes" / "common.sh").read_text("utf-8")
        assert all(word.partition("=")[0] in source for word in words if word.startswith("--")), text
    else:
        assert words[0] in ("git", "cd") or "venv" in text or "lmms_eval" in text or "vllm.entrypoints" in text, text


def check_names(code):
    """Compile Python; what it takes from vidsieve must be there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vidsieve":
            getattr(vidsieve, node.attr)


def run_python(code, names, folder):
    """Run a block and return what it printed."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(code, "block", "exec"), names)
    return printed.getvalue()


def without_times(text):
    """Return a text on one line without its decimal numbers, except percentages: times differ from run to run."""
    return " ".join(re.sub(r"\d+\.\d+(?!\d* %)", "N", text).split())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The clips that `vidsieve testbed render scenes` writes."""
    from vidsieve.cli.testbed import render

    folder = tmp_path_factory.mktemp("documents")
    with contextlib.chdir(folder):
        render(Path("scenes"))
    return folder / "scenes"


@pytest.fixture(scope="module")
def start(scenes):
    """The names of "Start here" after its first block."""
    names = {"__name__": "page"}
    code = next(text for kind, text in blocks(START) if kind == "python")
    run_python(code, names, scenes.parent)
    return names


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a block registers is forgotten after its page."""
    for table in (registry.compressors, registry.families):
        monkeypatch.setattr(table, "_table", dict(table._all()))


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path)], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(path, start, scenes, run, tmp_path, monkeypatch):
    if not any("render scenes" in text for _, text in blocks(path)):
        (tmp_path / "scenes").symlink_to(scenes)
    page = types.ModuleType("page")  # classes of a module can be pickled
    monkeypatch.setitem(sys.modules, "page", page)
    names, printed = vars(page), ""
    names.update({} if path == START else start)
    for kind, text in blocks(path):
        runs = not NOT_RUN.match(text)
        if kind == "python" and runs:
            printed = run_python(text, names, tmp_path)
        elif kind == "python":
            check_names(text)
        elif kind == "text":
            assert without_times(text) == without_times(printed)
        elif kind == "bash":
            for words in commands(text):
                if runs and words[:1] == ["vidsieve"]:
                    run(*words[1:], cwd=tmp_path)
                elif words:
                    assert not runs or words[0] in ("git", "cd", "pip", "make"), f"say what this needs: {words}"
                    check_other(words)
        elif kind == "console":
            for command, shown in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", text, re.MULTILINE):
                out, _ = run(*shlex.split(command)[1:], cwd=tmp_path)
                assert without_times(out) == without_times(shown)
        elif kind == "json":
            assert all(json.loads(line) for line in text.splitlines())
        elif kind == "toml":
            assert tomllib.loads(text)
        elif kind == "yaml":
            assert yaml.safe_load(text)
        else:
            assert not kind, f"no such kind of block: {kind}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_text_exist(path):
    for span in re.findall(r"`(vidsieve [a-z][^`…]*)`", FENCED.sub("", path.read_text("utf-8"))):
        words = shlex.split(span)[1:]
        command = COMMANDS["vidsieve"]
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert command is not COMMANDS["vidsieve"], span
        assert {word for word in words if word.startswith("--")} <= {*known, "--help"}, span
