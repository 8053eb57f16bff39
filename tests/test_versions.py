"""Bounds, locks and what is said of versions that were not tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vidsieve.io import versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def requirement(name):
    """Return what pyproject.toml asks for of a distribution."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return next(r for r in map(Requirement, lines) if r.name == name)


def locked(name):
    """Return the lines of a lock."""
    return (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").splitlines()


READ = {"vllm": "0.33"}
"""Newer releases that are allowed, and warned about: their sources pass a contract test, and they were not run."""


@pytest.mark.parametrize("name", list(versions.TESTED))
def test_upper_bounds_are_the_newest_minor_release_that_was_tested_or_read(name):
    oldest, newest = versions.TESTED[name]
    major, second = versions.minor(READ.get(name, newest))
    assert name not in READ or not versions.is_tested(name, READ[name])
    assert requirement(name).specifier == SpecifierSet(f">={oldest},<{major}.{second + 1}")


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_exact_versions_that_pyproject_allows_and_no_address(path):
    pinned = [Requirement(line) for line in locked(path.stem)]
    assert pinned and all(re.fullmatch(r"==[\w.+!]+", str(r.specifier)) and r.url is None for r in pinned)
    known = {r.name.lower() for r in pinned}
    extra = [] if path.stem == "run" else EXTRAS[path.stem]
    for wanted in map(Requirement, [*PROJECT["dependencies"], *extra]):
        if wanted.name == "vidsieve":
            continue
        assert wanted.name.lower() in known
        for found in pinned:
            if found.name.lower() == wanted.name.lower():
                assert str(found.specifier).removeprefix("==") in wanted.specifier
    assert {"hatchling", "editables"} <= known  # built without an environment of its own


def test_locks_agree_where_they_can():
    assert {path.stem for path in LOCKS} == {"run", "dev", "lmms-eval"}
    run, dev = (dict(re.split("==| ; ", line)[:2] for line in locked(name)) for name in ("run", "dev"))
    assert run.items() <= dev.items()


def test_a_python_without_a_lock_is_told_which_have_one():
    code = "import sys; sys.version_info = (3, 14, 0); exec(open('requirements/check_python.py').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Python 3.11 to 3.13" in done.stderr and "make lock" in done.stderr


def test_requirements_without_bounds_keep_everything_else():
    done = subprocess.run(
        [sys.executable, "requirements/unbounded.py", "dev"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    free = {r.name: r for r in map(Requirement, done.stdout.split())}
    assert {"transformers", "gradio", "ray", "pytest"} <= free.keys() and "vidsieve" not in free
    assert "99.0" in free["transformers"].specifier and "5.18" not in free["transformers"].specifier
    assert free["ray"].extras == {"data"}


def test_untested_versions_are_named_once(monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())
    with pytest.warns(UserWarning, match=r"ray 9\.1\.0 is untested .* passed with 2\.40 to"):
        versions.warn_untested("ray", "9.1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_untested("ray", "9.1.0")
        versions.warn_untested("gradio", versions.TESTED["gradio"][1] + ".4")


def build_page():
    from vidsieve.serving.page import build

    desk = SimpleNamespace(names=["full"], ask=None, methods={"full": None})
    build(desk, "x")


def open_cluster():
    from vidsieve.serving.ray_batch import import_ray

    import_ray()


def register_models():
    from vidsieve.serving.vllm import plugin

    with patch.object(plugin, "_watch_failures"):
        plugin.register()


def name_model():
    from vidsieve.evaluation.lmms_bridge import manifest

    manifest()


@pytest.mark.parametrize(
    ("name", "work"),
    [("gradio", build_page), ("ray", open_cluster), ("vllm", register_models), ("lmms-eval", name_model)],
)
def test_what_uses_a_dependency_warns_of_an_untested_one(name, work, monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.setitem(versions.TESTED, name, ("0.1", "0.1"))
    for module in ("gradio", "ray", "ray.data", "vllm", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, module, MagicMock(__version__="0.99.0"))
    monkeypatch.setattr("vidsieve.evaluation.lmms_bridge.installed", lambda name: "0.99.0")
    with pytest.warns(UserWarning, match=rf"{name} \S+ is untested .* passed with 0\.1"):
        work()
