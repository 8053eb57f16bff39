"""Our methods against recorded inputs and outputs of the official code: `pytest tests/oracles [--oracles DIR]`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from replays import run_file


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        folder = metafunc.config.getoption("oracles") or Path(__file__).parent
        paths = sorted(folder.glob("*.npz"))
        if not paths:
            raise pytest.UsageError(f"no .npz files in {folder}: give the folder of recorded cases")
        metafunc.parametrize("path", paths, ids=lambda path: path.stem)


def test_recorded_cases(path, subtests):
    cases = list(run_file(path))
    assert cases
    for case in cases:
        with subtests.test(case=case.case):
            if case.status == "no such method yet":
                pytest.skip(f"{case.method} has no replay here")
            assert case.status == "pass", f"{case.compared}: largest difference {case.difference:.1e} {case.note}"


def test_a_changed_record_is_noticed(tmp_path):
    data = dict(np.load(Path(__file__).parent / "divprune.npz"))
    data["sel/one/selected_in_order"] = (data["sel/one/selected_in_order"] + 1) % 30
    np.savez(tmp_path / "divprune.npz", **data)
    assert [case.case for case in run_file(tmp_path / "divprune.npz") if case.status == "fail"] == ["sel/one"]


def test_every_published_method_with_records_is_compared():
    recorded = {path.stem for path in Path(__file__).parent.glob("*.npz")}
    assert recorded == {
        "aot",
        "autogaze",
        "cacovid",
        "divprune",
        "dycoke",
        "earlytom",
        "evs",
        "fastv",
        "fastvid",
        "flashvid",
        "framefusion",
        "holitom",
        "prunevid",
        "pyramiddrop",
        "sparsevlm",
        "vcast",
        "vidcom2",
        "visionselector",
        "visionzip",
    }
