"""DivPrune at the size of a LLaVA-OneVision video: picks against the definition, time against two plain forms.

All in one run, alternating: ours; the release's form, which re-scans all picks at each step; and the full
N×N distance matrix with a running minimum. 32×196 tokens of width 3584, float32, 10 % kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vidsieve.compressors.divprune import diverse_picks
from vidsieve.io.machine import machine, spread, write_result


def video_like(frames: int, per_frame: int, width: int, seed: int) -> torch.Tensor:
    """Tokens (frames·per_frame, width) of a scene that drifts, with a cut half-way."""
    draw = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, per_frame, width, generator=draw)
    start = scenes.repeat_interleave(frames // 2, 0)
    drift = torch.randn(frames, per_frame, width, generator=draw) * 0.5
    return (start + drift).reshape(-1, width)


def rescanning(features: torch.Tensor, count: int) -> torch.Tensor:
    """The release's form: the distance matrix, then at every step the minimum over all picks anew."""
    unit = features / features.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    picks = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    for _ in range(count - 1):
        nearest = distance[picks].amin(0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


def running_minimum(features: torch.Tensor, count: int) -> torch.Tensor:
    """The distance matrix once, and a running minimum over the picks."""
    unit = features / features.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    picks = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    nearest = distance[picks[0]].clone()
    nearest[picks[0]] = -1
    for _ in range(count - 1):
        choice = int(nearest.argmax())
        picks.append(choice)
        nearest = torch.minimum(nearest, distance[choice])
        nearest[picks] = -1
    return torch.tensor(picks)


def by_definition(features: torch.Tensor, count: int) -> torch.Tensor:
    """The definition in double precision."""
    unit = torch.nn.functional.normalize(features.float(), dim=1).double()
    distance = 1 - unit @ unit.T
    alone = distance.clone().fill_diagonal_(torch.inf).amin(1)
    picks = [int(alone.argmax())]
    nearest = distance[picks[0]].clone()
    nearest[picks[0]] = -1
    for _ in range(count - 1):
        choice = int(nearest.argmax())
        picks.append(choice)
        nearest = torch.minimum(nearest, distance[choice])
        nearest[picks] = -1
    return torch.tensor(picks)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--per-frame", type=int, default=196)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/divprune.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = options.frames * options.per_frame // 10
    result = {"machine": machine(), "tokens": options.frames * options.per_frame, "width": options.width, "kept": count}
    for name, features in (
        ("video-like", video_like(options.frames, options.per_frame, options.width, 0)),
        (
            "gaussian",
            torch.randn(options.frames * options.per_frame, options.width, generator=torch.Generator().manual_seed(1)),
        ),
    ):
        wanted = by_definition(features, count)
        equal = bool(torch.equal(diverse_picks(features, count)[0], wanted))
        forms = {"ours": diverse_picks, "rescanning all picks": rescanning, "running minimum": running_minimum}
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        for _ in range(options.runs):
            for form, work in forms.items():
                seconds[form].append(timed(lambda work=work, features=features: work(features, count)))
        median = {form: spread(values)["median"] for form, values in seconds.items()}
        result[name] = {
            "picks_equal_definition": equal,
            "seconds": {form: spread(values) for form, values in seconds.items()},
            "times_faster_than_rescanning": median["rescanning all picks"] / median["ours"],
            "times_faster_than_running_minimum": median["running minimum"] / median["ours"],
        }
        print(name, result[name])
    write_result(options.json, result)


if __name__ == "__main__":
    main()
