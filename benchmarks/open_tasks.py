"""Both worlds of `python -m workbench open` in one result file, from two of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vidsieve.io.machine import machine, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="what --json wrote, one a world")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/open.json"))
    options = parser.parse_args()
    made = [json.loads(path.read_text("utf-8")) for path in options.results]
    write_result(options.json, {"machine": machine(), "worlds": {result["world"]: result for result in made}})


if __name__ == "__main__":
    main()
