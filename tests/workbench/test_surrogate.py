"""The search for settings without the LLM: what its coin knows, and that a policy learns from it."""

from __future__ import annotations

import pytest
import torch

from vidsieve.adapters.pruning import adapter_for
from workbench.testbed.surrogate import GUESSING, KNOWING, NeedyPrompts, SurrogateTrainer, answered, search


def test_a_question_is_answered_where_every_group_has_a_token():
    masks = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert answered(masks, ((0, 1), (2, 3))).tolist() == [True, False, False]


def test_prompts_need_tokens_of_what_they_are_about(testbed):
    model, processor = testbed
    prompts = NeedyPrompts(adapter_for(model), processor, seed=3)
    for number in (0, 40, 70):
        sample = prompts.choice(number)
        questions = prompts._scene(number % 32)[1]
        asked = questions[number // 32]
        assert asked.answer == sample.truth
        assert sample.needed and {token for group in sample.needed for token in group} == set(asked.targets)


@pytest.mark.slow
def test_a_policy_learns_from_the_coin(testbed, tmp_path, monkeypatch):
    model, processor = testbed
    rewards, original = [], SurrogateTrainer.rewards

    def noted(self, prompt, masks):
        found = original(self, prompt, masks)
        rewards.append((answered(masks, prompt.sample.needed), found[0]))
        return found

    monkeypatch.setattr(SurrogateTrainer, "rewards", noted)
    adapter = adapter_for(model.requires_grad_(False))
    few = {"steps": 40, "prompts_per_step": 8, "seed": 1}
    found = search(adapter, processor, tmp_path, few, prompts=60, report=lambda line: None)
    knowing, right = (torch.cat(parts) for parts in zip(*rewards, strict=True))
    assert float(right[knowing].mean()) == pytest.approx(KNOWING, abs=0.03)
    assert float(right[~knowing].mean()) == pytest.approx(GUESSING, abs=0.03)
    assert found["hit_10"] > found["other_10"]
