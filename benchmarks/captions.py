"""How well captions are told from kept tokens: cross-entropy per word on fresh scenes, methods that read these alone.

SCORE is trained on this figure. Differences to all tokens are paired scene by scene.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.cli.shared import quiet
from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError
from vidsieve.evaluation.conditions import named_methods
from vidsieve.evaluation.stats import clustered_mean, paired_difference
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model
from vidsieve.testbed.world import TOKENS
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.rollouts import Rollouts
from vidsieve.types import Selection, Stage


def cross_entropies(methods: dict[str, Compressor], world: str, seed: int, scenes: int) -> dict[str, list[float]]:
    """Return the caption's cross-entropy per scene under all tokens and under every method."""
    model, processor = load_model("testbed")
    adapter = adapter_for(model)
    prompts = ScenePrompts(adapter, processor, world=world, seed=seed)
    found: dict[str, list[float]] = {}
    for scene in range(scenes):
        rollouts = Rollouts(adapter, prompts.caption(scene).inputs)
        video = rollouts.video()
        generator = torch.Generator().manual_seed(scene)
        chosen, names = [Selection(torch.arange(TOKENS))], ["full"]
        for name, method in methods.items():
            with suppress(BudgetError):  # some cannot keep so little of any video
                chosen.append(method.compress(video, generator=generator))
                names.append(name)
        for name, value in zip(names, rollouts.caption_ce(chosen).tolist(), strict=True):
            found.setdefault(name, []).append(value)
    return found


def label(name: str, method: Compressor) -> str:
    """Return a method's name and variant, or for the policy of a run RUN/policy the name of the run."""
    return Path(name).parent.name if Path(name).is_dir() else f"{method.name}/{method.variant}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="all", help="names, or folders of policies, separated by commas")
    parser.add_argument("--retention", default="0.25,0.1,0.05")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=9001)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/captions.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    methods = {
        f"{label(name, method)}/{retention}": method.with_retention(float(retention))
        for name in options.methods.split(",")
        for method in named_methods([name], prefill=True).values()
        if not method.needs and method.acts is Stage.PRE_LLM
        for retention in options.retention.split(",")
    }
    worlds: dict[str, Any] = {}
    for world in ("dense", "dense-b"):
        values = cross_entropies(methods, world, options.seed, options.scenes)
        scenes = list(range(options.scenes))
        worlds[world] = {}
        for name, found in values.items():
            mean, gap = clustered_mean(found, scenes), paired_difference(found, values["full"], scenes)
            worlds[world][name] = {
                "ce": mean.mean,
                "stderr": mean.stderr,
                "above_full": gap.mean,
                "interval": list(gap.interval),
            }
            print(f"{world}  {name:32s} {mean.mean:.3f} ± {mean.stderr:.3f}   above full {gap.mean:+.3f}")
    write_result(options.json, {"machine": machine(), "seed": options.seed, "scenes": options.scenes, "worlds": worlds})


if __name__ == "__main__":
    main()
