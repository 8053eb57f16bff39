"""Machines by name: peak operations, bandwidth and memory from their datasheets; a CPU is measured where it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from vidsieve.errors import EvaluationError, UnknownNameError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EFFICIENCY = 0.5
"""Share of the datasheet's matrix products that a prefill is taken to reach: large products alone reach more, attention
and what is no product less. A round figure, not a measurement."""
BANDWIDTH_SHARE = 0.8
"""Share of the datasheet's bandwidth that reading weights and caches is taken to reach. Not a measurement either."""


@dataclass(frozen=True)
class Machine:
    """One GPU, or the CPU.

    Parameters
    ----------
    name : str
    tflops : mapping of str to float
        By dtype, 10¹² operations of matrix products a second, without sparsity; float32 without TF32.
    bandwidth : float
        GB read or written a second.
    memory : float
        GB, of 10⁹ bytes.
    efficiency, bandwidth_share : float
        What of `tflops` and of `bandwidth` is reached.
    """

    name: str
    tflops: Mapping[str, float]
    bandwidth: float
    memory: float
    efficiency: float = EFFICIENCY
    bandwidth_share: float = BANDWIDTH_SHARE

    def seconds(self, operations: float, size: float, dtype: str) -> float:
        """Return what takes longer: so many operations, or so many bytes to be read."""
        computed = operations / (1e12 * self.tflops[dtype] * self.efficiency)
        return max(computed, size / (1e9 * self.bandwidth * self.bandwidth_share))


def _gpu(name: str, half: float, single: float, bandwidth: float, memory: float) -> Machine:
    return Machine(name, {"bf16": half, "fp16": half, "fp32": single}, bandwidth, memory)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("H100", 989.4, 66.9, 3350, 80),  # SXM5
        _gpu("H200", 989.4, 66.9, 4800, 141),
        _gpu("A100-80GB", 312, 19.5, 2039, 80),  # SXM4
        _gpu("A100-40GB", 312, 19.5, 1555, 40),
        _gpu("L40S", 362, 91.6, 864, 48),
        _gpu("L4", 121, 30.3, 300, 24),
        _gpu("A10", 125, 31.2, 600, 24),
        _gpu("RTX4090", 165.2, 82.6, 1008, 24),  # products summed in float32
    )
}
"""From NVIDIA's datasheets; where these state operations with sparsity, half of them."""


def machine_of(
    name: str,
    dtype: str,
    *,
    peak_tflops: float | None = None,
    bandwidth: float | None = None,
    memory: float | None = None,
    efficiency: float | None = None,
) -> Machine:
    """Return a machine of the table, ``cpu`` measured now, or any other whose three figures are given.

    Raises
    ------
    UnknownNameError
        If there is no such machine, and not all three figures are given, or no such dtype.
    EvaluationError
        If a figure is not positive.
    """
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if peak_tflops is not None and bandwidth is not None and memory is not None:
        found = found or Machine(name, {}, bandwidth, memory)
    elif name.lower() == "cpu":
        found = measured_cpu(dtype)
    if found is None:
        hint = "For any other machine give --peak-tflops, --bandwidth and --memory."
        raise UnknownNameError("GPU", name.upper(), [*GPUS, "cpu"], hint)
    found = replace(
        found,
        tflops=found.tflops if peak_tflops is None else {**found.tflops, dtype: peak_tflops},
        bandwidth=found.bandwidth if bandwidth is None else bandwidth,
        memory=found.memory if memory is None else memory,
        efficiency=found.efficiency if efficiency is None else efficiency,
    )
    for figure in (found.tflops[dtype], found.bandwidth, found.memory):
        if not figure > 0:
            raise EvaluationError(f"--peak-tflops, --bandwidth and --memory are positive numbers; got {figure:g}")
    return found


def measured_cpu(dtype: str = "fp32", *, side: int = 1536, megabytes: int = 256, repeats: int = 5) -> Machine:
    """Return this CPU at torch's present threads: the best of some matrix products and copies, all of it reached.

    Parameters
    ----------
    side : of the square matrices that are multiplied
    megabytes : copied, and so counted twice
    """
    left, right = (torch.randn(side, side).to(DTYPES[dtype]) for _ in range(2))
    source = torch.ones(megabytes * 10**6, dtype=torch.uint8)
    target = torch.empty_like(source)
    operations = 2 * side**3 / _best(lambda: left @ right, repeats)
    copied = 2 * len(source) / _best(lambda: target.copy_(source), repeats)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("cpu", {dtype: operations / 1e12}, copied / 1e9, memory / 1e9, 1.0, 1.0)


def _best(run: Callable[[], object], repeats: int) -> float:
    spent = []
    for _ in range(repeats + 1):  # the first touches fresh memory
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return min(spent)
