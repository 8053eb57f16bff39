"""Memory of SCORE's scores for a video of Qwen2.5-VL's size, compared with forming [X; ΔX].

Peak resident memory of each form in its own process, beyond the tokens themselves; 64×19×35 tokens of width 3584,
float32, hidden 512.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

from vidsieve.compressors.score import ScorePolicy
from vidsieve.io.machine import machine, peak_memory, spread, write_result
from vidsieve.types import TokenGrid

GRID, WIDTH, HIDDEN = TokenGrid(64, 19, 35), 3584, 512


def _inputs() -> tuple[torch.Tensor, ScorePolicy]:
    embeds = torch.randn(GRID.num_tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    return embeds, ScorePolicy.start(WIDTH, "none", variant="paper", hidden=HIDDEN).eval()


@torch.no_grad()
def ours(embeds: torch.Tensor, policy: ScorePolicy) -> torch.Tensor:
    return policy.logits(embeds, GRID)


@torch.no_grad()
def concatenated(embeds: torch.Tensor, policy: ScorePolicy) -> torch.Tensor:
    frames = embeds.reshape(GRID.frames, GRID.per_frame, WIDTH)
    delta = torch.cat([frames[:1], frames[1:] - frames[:-1]])
    state = torch.cat([frames, delta], -1)
    hidden = state @ torch.cat([policy.token.weight, policy.surprise.weight], 1).T + policy.token.bias
    return policy.out(torch.nn.functional.gelu(hidden)).flatten()


def _measure(form: str, threads: int, runs: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    embeds, policy = _inputs()
    work = {"ours": ours, "concatenated": concatenated}[form]
    before = peak_memory(reset=True)
    scores = work(embeds, policy)
    extra = peak_memory() - before
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work(embeds, policy)
        seconds.append(time.perf_counter() - start)
    queue.put((extra, seconds, scores.double().sum().item(), scores[::4001].tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/score_memory.json"))
    options = parser.parse_args()
    context, results = multiprocessing.get_context("spawn"), {}
    for form in ("ours", "concatenated"):
        queue = context.Queue()
        process = context.Process(target=_measure, args=(form, options.threads, options.runs, queue))
        process.start()
        results[form] = queue.get()
        process.join()
    state = GRID.num_tokens * 2 * WIDTH * 4
    difference = max(abs(a - b) for a, b in zip(results["ours"][3], results["concatenated"][3], strict=True))
    result = {
        "machine": machine(),
        "tokens": GRID.num_tokens,
        "width": WIDTH,
        "hidden": HIDDEN,
        "bytes_of_x_and_delta": state,
        "extra_bytes": {form: values[0] for form, values in results.items()},
        "ours_over_x_and_delta": results["ours"][0] / state,
        "concatenated_over_x_and_delta": results["concatenated"][0] / state,
        "seconds": {form: spread(values[1]) for form, values in results.items()},
        "largest_score_difference": difference,
    }
    print(result)
    write_result(options.json, result)


if __name__ == "__main__":
    main()
