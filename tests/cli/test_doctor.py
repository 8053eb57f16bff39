"""`vidsieve doctor`: what works with what is installed here."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path

import pytest

from vidsieve import registry
from vidsieve.adapters.session import Session
from vidsieve.cli import main
from vidsieve.io import versions
from vidsieve.testing import doctor, tiny_models
from vidsieve.testing.tiny_models import FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run():
        target = tmp_path / "found.json"
        monkeypatch.setattr("sys.argv", ["vidsieve", "doctor", "--json", str(target)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, capsys.readouterr().out, json.loads(target.read_text())["findings"]

    return run


def test_every_family_and_method_is_tried(run):
    code, text, found = run()
    names = {kind: [row["name"] for row in found if row["kind"] == kind] for kind in ("family", "method", "extra")}
    assert code == 0 and names["method"] == [*registry.compressors, "reuse+random"]
    assert len(names["family"]) == len(registry.families.names())
    assert all(row["ok"] for row in found if row["kind"] == "method")
    families = {row["name"]: row["ok"] for row in found if row["kind"] == "family"}
    assert [name for name, ok in families.items() if ok] == list(FAMILIES) and False not in families.values()
    line = next(line for line in text.splitlines() if line.startswith("  transformers"))
    assert line.split()[:3] == ["transformers", "ok", versions.installed("transformers")]


def test_what_does_not_work_is_named_and_ends_with_exit_code_1(run, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("past_key_values")

    monkeypatch.setitem(versions.TESTED, "transformers", ("4.0", "4.1"))
    monkeypatch.setattr(Session, "__enter__", broken)
    monkeypatch.setattr(tiny_models, "FAMILIES", {"llava_onevision": FAMILIES["llava_onevision"]})
    code, text, found = run()
    row = next(row for row in found if row["name"] == "fastv")
    assert code == 1 and row["ok"] is False and row["state"] == "unexpected KeyError: 'past_key_values'"
    line = next(line for line in text.splitlines() if line.startswith("  transformers"))
    assert line.split()[1] == "untested" and line.endswith("(tested: 4.0 to 4.1)")


def test_an_extra_that_breaks_while_it_is_imported_is_a_finding(monkeypatch):
    real = importlib.import_module

    def half_installed(name, *args):
        if name == "ray.data":
            raise RuntimeError("built for another pyarrow")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", half_installed)
    rows = {row.name: row for row in doctor.found_extras()}
    assert rows["ray"].ok is False and "RuntimeError: built for another pyarrow" in rows["ray"].state
    assert rows["benchmarks"].ok


def test_every_extra_for_users_is_looked_at():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}
