"""A search for settings of CaCoVID without the LLM: a coin answers, which knows the tokens that a question needs.

A prompt of the real model costs some 140 ms, here 5 ms. The coin lands on "right" with probability .95 where a rollout
keeps one token of every group that the question needs, else with .27, about as the testbed's models answer. What learns
here has learned at least as fast on the real model. A figure of this module is no result and is never reported as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.selection import kept_tokens, top_indices
from vidsieve.testbed.world import TOKENS, make_cast
from vidsieve.training.cacovid import CaCoVIDTrainer, Prompted, difference
from vidsieve.training.data.samples import Choice
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.recipes import new_cacovid
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig
from vidsieve.training.sources import HELD_OUT_SEED, TRAINING_SEED
from vidsieve.types import Need
from workbench.testbed.language import needed_tokens

KNOWING, GUESSING = 0.95, 0.27
"""Probability of a right answer with the tokens that a question needs, and without."""


@dataclass(frozen=True)
class NeedyChoice(Choice):
    """A multiple-choice prompt with groups of tokens of which one each is needed."""

    needed: tuple[tuple[int, ...], ...] = ()


class NeedyPrompts(ScenePrompts):
    """Scenes whose prompts know what they need."""

    def choice(self, number: int) -> NeedyChoice:
        """Return prompt `number`."""
        plain, (index, question) = super().choice(number), self.asked(number)
        groups = needed_tokens(question.kind, question.targets, make_cast(self.world, self.seed, index))
        return NeedyChoice(plain.inputs, plain.option_ids, plain.answer, plain.truth, needed=tuple(groups))


def answered(masks: Tensor, needed: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return (G,) bool, True where a keep-mask (G, N) holds a token of every group."""
    return torch.stack([masks[:, list(group)].any(1) for group in needed]).all(0)


class SurrogateTrainer(CaCoVIDTrainer):
    """CPO whose rewards come from a coin."""

    def prepare(self, sample: Choice) -> Prompted:
        """Return a prompt, its video encoded; nothing is asked of the LLM."""
        return Prompted(sample, Rollouts(self.adapter, sample.inputs, self.packing), self.config.ratio)

    def rewards(self, prompt: Prompted, keep_masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rewards of keep-masks (G, N), twice."""
        sample = prompt.sample
        if not isinstance(sample, NeedyChoice):
            raise TypeError("the surrogate is for prompts that know what they need")
        chance = torch.where(answered(keep_masks.cpu(), sample.needed), KNOWING, GUESSING)
        right = (torch.rand(len(chance), generator=self.generator) < chance).float()
        return right, right


def search(
    adapter: Adapter,
    processor: Any,
    folder: Path,
    settings: dict[str, Any],
    *,
    variant: str = "ours",
    prompts: int = 200,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train with the coin and return how often the best tokens hold what held-out questions need.

    Parameters
    ----------
    settings : dict
        Settings of CaCoVID that differ from the variant's.
    prompts : int
        Held-out prompts.

    Returns
    -------
    dict
        ``hit_10``, ``hit_5`` at 10 and 5 % of the tokens, and with another question ``other_10``, ``other_5``.
    """
    config = CaCoVIDConfig(**SETTINGS["cacovid", variant] | {"eval_prompts": 0} | settings)
    policy = new_cacovid(adapter, config, variant, "surrogate")
    train = NeedyPrompts(adapter, processor, config.world, TRAINING_SEED + config.seed)
    trainer = SurrogateTrainer(adapter, policy, config, train.choice, folder)
    trainer.fit()
    held = NeedyPrompts(adapter, processor, config.world, HELD_OUT_SEED)
    found = measured(adapter, policy.eval(), held, prompts)
    report("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


@torch.no_grad()
def measured(adapter: Adapter, policy: CaCoVIDPolicy, held: NeedyPrompts, prompts: int) -> dict[str, float]:
    """Return the hit rates of a policy, as `search` has them."""
    hits: dict[str, list[bool]] = {}
    for number in range(prompts):
        sample = held.choice(number)
        for which, asked in (("hit", sample), ("other", held.choice(number + 32))):  # the same scene's next question
            video = Rollouts(adapter, asked.inputs).video(frozenset({Need.QUESTION}))
            scores = difference(policy(video)[0])
            for percent in (10, 5):
                mask = torch.zeros(1, TOKENS, dtype=torch.bool)
                mask[0, top_indices(scores, kept_tokens(percent / 100, TOKENS))] = True
                hits.setdefault(f"{which}_{percent}", []).append(bool(answered(mask, sample.needed)))
    return {name: sum(values) / len(values) for name, values in hits.items()}
