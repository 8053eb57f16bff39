"""Seconds per training prompt on scenes of the testbed, rendered where they are used and by a thread ahead.

Each prompt is what SCORE does with it before the policy learns: a fresh scene, encoded, and the frozen testbed model
run on keep-masks of its caption. The ways alternate in one process; both must give the same rewards to the bit. The
thread gains what it renders if a core is idle (`--threads` below the number of cores), nothing otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.io.machine import machine, spread, write_result
from vidsieve.loading import load_model
from vidsieve.training.data.prefetch import Prefetch
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.rollouts import Rollouts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/scenes_ahead.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = load_model("testbed")
    adapter = adapter_for(model)
    seconds: dict[str, list[float]] = {"inline": [], "ahead": []}
    on_core: dict[str, list[float]] = {way: [] for way in seconds}
    expected: list[torch.Tensor] = []
    for turn in range(options.repeats + 1):  # the first is not counted
        for way, workers in (("inline", 0), ("ahead", 1)):
            prompts, said = ScenePrompts(adapter, processor, seed=1), []
            with Prefetch(prompts.read_caption, workers) as ahead:
                start, busy = time.perf_counter(), time.process_time()
                for number in range(options.prompts):
                    rollouts = Rollouts(adapter, prompts.finished(ahead(number)).inputs)
                    tokens = rollouts.encoded.videos[0].features.grid.num_tokens
                    draw = torch.Generator().manual_seed(number)
                    said.append(rollouts.caption_ce(torch.rand(options.rollouts, tokens, generator=draw) < 0.25))
                took, busy = time.perf_counter() - start, time.process_time() - busy
            if turn:
                seconds[way].append(took / options.prompts)
                on_core[way].append(busy / options.prompts)
            expected = expected or said
            if not all(map(torch.equal, said, expected)):
                raise SystemExit(f"{way}: other rewards")
    middle = {way: spread(times)["median"] for way, times in seconds.items()}
    result = {
        "what": f"{options.prompts} captions of fresh scenes, {options.rollouts} masks each",
        "machine": machine(),
        "load": os.getloadavg(),
        "seconds_per_prompt": {way: spread(times) for way, times in seconds.items()},
        "cores_had": {way: spread(times)["median"] / middle[way] for way, times in on_core.items()},
        "times_faster": middle["inline"] / middle["ahead"],
    }
    write_result(options.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
