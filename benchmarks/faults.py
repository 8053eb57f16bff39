"""Faults made on purpose in our own source, one at a time, and the test that notices each of them first.

`faults.toml` lists them: what breaks, the text of a file that is replaced, and the tests nearest to it. Everything
happens in copies of the repository. A fault that no test notices SURVIVED, and the exit code is 1; it is 2 where the
list is wrong: text that is not in its file exactly once, a test that is gone or fails anyway, an import that fails.

    python benchmarks/faults.py --json benchmarks/results/faults.json
    python benchmarks/faults.py --only 'cache|resume' --skip-clean
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT, LIST = Path(__file__).resolve().parents[1], Path(__file__).with_suffix(".toml")
FOLDERS = ("src", "tests", "benchmarks", "workbench", "docs", "recipes", "requirements")
FILES = ("pyproject.toml", "README.md", "LICENSE", "Makefile")
SURVIVED = "SURVIVED"
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", "--timeout=600"]
"""A test that hangs fails after ten minutes."""
INVALID = re.compile(r"(SyntaxError|IndentationError|NameError|ImportError|ModuleNotFoundError)\b")
"""Errors that say nothing but that a fault was written down wrongly."""


class ListError(Exception):
    """The list of faults is wrong."""


@dataclass(frozen=True)
class Fault:
    """What breaks, in which file, what is replaced there by what, and the tests nearest to it."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def made(self) -> str:
        """Return the file's text with the fault in it; an error unless the list is right about it."""
        text = (ROOT / self.file).read_text("utf-8")
        if text.count(self.old) != 1 or self.old == self.new:
            raise ListError(f"{self.name}: its text is {text.count(self.old)} times in {self.file}, must be once")
        if gone := [test for test in self.tests if not (ROOT / test.partition("::")[0]).is_file()]:
            raise ListError(f"{self.name}: there is no {gone[0]}")
        changed = text.replace(self.old, self.new)
        try:
            compile(changed, self.file, "exec")
        except SyntaxError as error:
            raise ListError(f"{self.name}: {self.file} is no Python with it ({error})") from None
        return changed


def copied(folder: Path) -> Path:
    """Return a folder with a copy of all that the tests need."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def first_failure(folder: Path, tests: Iterable[str]) -> str:
    """Return the first of some tests that fails in a copy, empty where all pass."""
    # As in CI: hypothesis draws the same examples every time, and messages are not cut off. One thread: the models are
    # tiny, and threads that wait for each other on a busy machine are many times slower.
    settings = os.environ | {"PYTHONPATH": str(folder / "src"), "CI": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*PYTEST, *tests], cwd=folder, env=settings, capture_output=True, text=True)
    summary = done.stdout.rpartition("short test summary info")[2]
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - (.*))?$", summary, re.MULTILINE)
    if done.returncode == 0:
        return ""
    # Other codes than 1: a module cannot be collected, or a test is not there.
    if done.returncode != 1 or failed is None or INVALID.match(failed[2] or ""):
        raise ListError("\n".join((done.stdout + done.stderr).strip().splitlines()[-15:]))
    return failed[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="faults of such names; the rest of --json stays")
    parser.add_argument("--workers", type=int, default=1, help="faults tried at a time, each in a copy of its own")
    parser.add_argument("--skip-clean", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--json", type=Path, help="where to write {name: {test, seconds}}")
    options = parser.parse_args()
    listed = [Fault(**row) for row in tomllib.loads(LIST.read_text("utf-8"))["fault"]]
    if len({fault.name for fault in listed if fault.made()}) < len(listed):
        raise ListError("two faults have one name")
    if not (faults := [fault for fault in listed if re.search(options.only, fault.name)]):
        raise ListError(f"no fault is called {options.only!r}")
    found: dict[str, dict[str, str | float]] = {}
    wrong: list[str] = []
    copies: SimpleQueue[Path] = SimpleQueue()

    def attempt(fault: Fault) -> None:
        folder, start = copies.get(), time.perf_counter()
        path = folder / fault.file
        before = path.read_bytes()
        path.write_text(fault.made(), "utf-8")
        try:
            said = first_failure(folder, fault.tests) or SURVIVED
            seconds = round(time.perf_counter() - start, 1)
            found[fault.name] = {"test": said, "seconds": seconds}
            print(f"{seconds:6.1f} s  {fault.name}: {said}", flush=True)
        except ListError as error:
            wrong.append(fault.name)
            print(f"   wrong  {fault.name}:\n{error}", flush=True)
        finally:
            path.write_bytes(before)
            copies.put(folder)

    with tempfile.TemporaryDirectory(prefix="vidsieve-faults-") as folder:
        for number in range(options.workers):
            copies.put(copied(Path(folder, str(number))))
        named = dict.fromkeys(test for fault in faults for test in fault.tests)
        if not options.skip_clean and (failed := first_failure(Path(folder, "0"), named)):
            raise ListError(f"{failed} fails without any fault")
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(attempt, faults))
    if options.json:
        known = json.loads(options.json.read_text("utf-8")) if options.only and options.json.exists() else {}
        whole = {fault.name: {**known, **found}.get(fault.name) for fault in listed}
        text = json.dumps({name: entry for name, entry in whole.items() if entry}, indent=2, ensure_ascii=False)
        options.json.write_text(text + "\n", "utf-8")
    survived = sum(entry["test"] == SURVIVED for entry in found.values())
    print(f"{len(found) - survived} of {len(faults)} noticed, {survived} survived, {len(wrong)} wrong in the list")
    return 2 if wrong else int(survived > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ListError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
