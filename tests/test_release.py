"""What a release and a contribution rest on: workflows, templates, the check of distributions, one version."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import vidsieve
from vidsieve import _version

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (GITHUB / "workflows").glob("*.yml")}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_targets_that_exist_with_little_leave(name):
    workflow = WORKFLOWS[name]
    commands = [shlex.split(step["run"]) for step in steps(workflow) if "run" in step]
    assert commands
    for command, target, *variables in commands:
        assert command == "make" and target in TARGETS
        assert all(re.match(r"(PYTHON|VERSION)=", variable) for variable in variables)
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@\S+", step["uses"]) for step in steps(workflow) if "uses" in step)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_contributors_are_told_of_targets_that_exist():
    named = re.findall(r"\bmake ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert {"test", "format", "dist"} <= set(named) <= TARGETS


def test_the_matrix_is_what_the_package_says_it_runs_on():
    said = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]
    jobs = WORKFLOWS["test"]["jobs"]
    assert jobs["locked"]["strategy"]["matrix"]["python"] == said
    assert PROJECT["project"]["requires-python"] == f">={said[0]}"
    asked = {step["run"].split()[1] for step in steps(WORKFLOWS["test"]) if "run" in step}
    assert asked == {"test", "fuzz", "test-oldest", "test-newest", "dist"}
    events = WORKFLOWS["test"][True]  # YAML reads the word "on" as true
    assert {"push", "pull_request", "schedule"} <= events.keys() and "schedule" in jobs["newest"]["if"]


def test_a_tag_publishes_what_was_built_from_it():
    workflow = WORKFLOWS["release"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert any(step.get("run", "").endswith('VERSION="${GITHUB_REF_NAME#v}"') for step in build["steps"])
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert not [step for step in steps(workflow) if "password" in str(step).lower()]


def test_the_version_is_in_one_place():
    assert vidsieve.__version__ == _version.__version__
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/vidsieve/_version.py"
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]


@pytest.mark.parametrize("name", ["bug", "method", "family"])
def test_an_issue_form_has_the_parts_that_forms_have(name):
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text("utf-8"))
    assert form["name"] and form["description"] and form["labels"] == [name]
    names = [part["id"] for part in form["body"]]
    assert len(set(names)) == len(names)
    for part in form["body"]:
        assert part["type"] in ("input", "textarea", "dropdown", "checkboxes") and part["attributes"]["label"]
        assert ("options" in part["attributes"]) == (part["type"] in ("dropdown", "checkboxes"))


def test_pre_commit_runs_what_make_check_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert all(hook["language"] == "system" for hook in repository["hooks"])
    check = (ROOT / "Makefile").read_text("utf-8").partition("\ncheck:")[2].partition("\n\n")[0]
    for line in re.findall(r"^\t\$\(BIN\)/(.+)$", check, re.MULTILINE):
        words = [word for word in line.split() if word not in (".", "--check")]
        assert any(entry.startswith(f".venv/bin/{' '.join(words)}") for entry in entries), line


# -- distributions ----------------------------------------------------------------------------------------------


def checking():
    """Return requirements/check_dist.py as a module."""
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / "requirements" / "check_dist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METADATA = "Metadata-Version: 2.4\nName: vidsieve\nVersion: {}\nDescription-Content-Type: text/markdown\n\n# vidsieve\n"
FILES = {"src/vidsieve/__init__.py", "src/vidsieve/py.typed", "LICENSE", "tests/test_one.py"}


def distributions(folder, wheel=(), sdist=(), without=(), version="1.0"):
    """Write a wheel and an sdist of `FILES`, with more in either and some left out of both."""
    info = f"vidsieve-{version}.dist-info"
    inside = {name.removeprefix("src/") for name in FILES if name.startswith("src/")} | set(wheel)
    texts = {name: "" for name in inside - set(without)} | {
        f"{info}/METADATA": METADATA.format(version),
        f"{info}/entry_points.txt": "[console_scripts]\nvidsieve = vidsieve.cli:main\n",
        f"{info}/licenses/LICENSE": "",
    }
    with zipfile.ZipFile(folder / f"vidsieve-{version}-py3-none-any.whl", "w") as file:
        for name, text in texts.items():
            file.writestr(name, text)
    with tarfile.open(folder / f"vidsieve-{version}.tar.gz", "w:gz") as file:
        for name in (FILES | set(sdist) | {"PKG-INFO"}) - set(without):
            data = METADATA.format(version).encode() if name == "PKG-INFO" else b""
            member = tarfile.TarInfo(f"vidsieve-{version}/{name}")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"wheel": ["tests/test_one.py"]}, ["the wheel has tests/test_one.py, which is not tracked"]),
        ({"sdist": ["runs/1/x.json"]}, ["the sdist has runs/1/x.json, which is not tracked"]),
        ({"without": ["vidsieve/py.typed"]}, ["the wheel lacks vidsieve/py.typed"]),
        ({"without": ["tests/test_one.py"]}, ["the sdist lacks tests/test_one.py"]),
    ],
    ids=["good", "tests in the wheel", "a run in the sdist", "no py.typed", "no tests"],
)
def test_distributions_hold_the_tracked_files_and_no_others(change, said, tmp_path):
    assert checking().faults(distributions(tmp_path, **change), FILES) == said


def test_distributions_are_one_pair_of_the_version_asked_for(tmp_path):
    check = checking()
    distributions(tmp_path)
    assert check.faults(tmp_path, FILES, "1.0") == []
    assert [line.partition(",")[0] for line in check.faults(tmp_path, FILES, "1.1")] == [
        "the wheel is of version 1.0",
        "the sdist is of version 1.0",
    ]
    distributions(tmp_path, version="1.1")
    assert "holds 2 wheels and 2 sdists" in check.faults(tmp_path, FILES)[0]
