"""The machine and its memory, and helpers of benchmarks: the spread of a figure, peak memory, a JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from vidsieve._version import __version__
from vidsieve.io.files import writing


def machine() -> dict[str, Any]:
    """Return the processor, cores, threads, GPU and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if os.path.isfile(info):
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "vidsieve": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def total_memory() -> int:
    """Return the bytes of memory of this machine or of the container around us; 8 GiB if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        total = 8 * 2**30
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if os.path.isfile(limit) else ""
    return min(total, int(text)) if text.isdigit() else total


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(values), "median": median(values), "max": max(values), "runs": len(values)}


def peak_memory(reset: bool = False) -> int:
    """Return the peak resident memory of this process in bytes, since the last `reset`.

    Linux only: reads ``VmHWM``.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    return 0


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
