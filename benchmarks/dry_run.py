"""`vidsieve train --dry-run` against trainings: ten steps and a resume on random models of half a billion parameters.

The models have a 0.5B LLM and the classes of the recipes. Prediction and training run in this process on this machine,
measured before each training; the ratio of the two times of a prompt is what counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.evaluation import blueprints
from vidsieve.evaluation.blueprints import random_model
from vidsieve.io.machine import machine, peak_memory, write_result
from vidsieve.serving.dry_run import dry_run
from vidsieve.serving.plan import Gpu
from vidsieve.training.cacovid import CaCoVIDTrainer
from vidsieve.training.data.samples import Choice
from vidsieve.training.recipes import new_cacovid
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig
from vidsieve.video.reading import Video

LLM, EYES = (896, 4864, 24, 14, 2), (768, 2048, 12, 12)
SIZES = {
    "qwen2.5-vl-0.5b": ("qwen2_5_vl", LLM, EYES),
    "qwen3-vl-0.5b": ("qwen3_vl", (1024, 3072, 28, 16, 8), (1024, 4096, 8, 16)),
    "llava-onevision-0.5b": ("llava_onevision", LLM, (768, 3072, 12, 12)),
}
"""Family, LLM and vision encoder of each, as `blueprints` has them."""
STEPS, FRAMES, SIZE = 10, 4, (360, 640)


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Return prediction and measurement of one model's training."""
    settings = {
        "frames": FRAMES,
        "token_rollouts": 8,
        "frame_rollouts": 0,
        "prompts_per_step": 1,
        "eval_prompts": 0,
        "log_every": 1,
        "save_every": 1,
        "workers": 0,
    }
    model = random_model(name)
    adapter = adapter_for(model.model.requires_grad_(False))
    pixels = np.random.default_rng(0).integers(0, 255, (FRAMES, *SIZE, 3), dtype=np.uint8)
    video = Video(pixels, np.arange(FRAMES, dtype=float), (), FRAMES, 1.0, FRAMES, SIZE)
    inputs = model.inputs(video, 40)
    predicted = dry_run(
        "cacovid", name, {**settings, "steps": STEPS}, Gpu.here(), variant="paper", size=SIZE, text_tokens=50
    )

    def sample(number: int) -> Choice:
        draw = torch.Generator().manual_seed(number)
        options = torch.randint(1000, 50_000, (4,), generator=draw)
        return Choice(inputs, options, number % 4, "")

    def trained(steps: int, resume: bool) -> list[float]:
        config = CaCoVIDConfig(**SETTINGS["cacovid", "paper"] | settings | {"steps": steps})
        policy = new_cacovid(adapter, config, "paper", name)
        times = [time.perf_counter()]

        class Timed(CaCoVIDTrainer):
            def _optimise(self, *arguments: Any) -> Any:
                result = super()._optimise(*arguments)
                times.append(time.perf_counter())
                return result

        Timed(adapter, policy, config, sample, folder).fit(resume=resume)
        return [later - earlier for earlier, later in pairwise(times)]

    peak_memory(reset=True)
    first, rest = trained(STEPS // 2, False), trained(STEPS, True)
    steady = sorted([*first[1:], *rest[1:]])  # the first step of either opens files and allocates
    prompt_s = steady[len(steady) // 2]
    return {
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "steps": len(first) + len(rest),
        "predicted": {k: v for k, v in predicted.items() if k != "assumptions"},
        "prompt_s": prompt_s,
        "rollouts_per_s": 8 / prompt_s,
        "peak_bytes": peak_memory(),
        "ratio": predicted["prompt_s"] / prompt_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/dry_run.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    blueprints._SIZES.update(SIZES)
    blueprints.BLUEPRINTS.update({n: (s[0], partial(blueprints._configuration, n)) for n, s in SIZES.items()})
    earlier = json.loads(options.json.read_text("utf-8"))["models"] if options.json.exists() else {}
    result: dict[str, Any] = {"machine": machine(), "models": earlier}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            row = result["models"][name] = measured(name, Path(folder))
        ours, theirs = row["predicted"]["prompt_s"], row["prompt_s"]
        print(f"{name}: a prompt takes {ours:.2f} s as predicted, {theirs:.2f} s as measured", flush=True)
        write_result(options.json, result)


if __name__ == "__main__":
    main()
