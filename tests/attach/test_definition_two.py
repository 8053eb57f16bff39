"""Definition 2 of correctness catches what it is for: faults made on purpose, in Qwen3.5 and Gemma 4.

All but the conv state's act only where tokens are dropped, so that the comparison of every token kept cannot see them.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

from vidsieve.adapters.adapter import Adapter
from vidsieve.testing.calls import Case
from vidsieve.testing.checks import CheckFailure
from vidsieve.testing.equivalence import CALLS, check_family
from workbench.families import tiny

BATCH, WORDS = [[2], [1]], [6, 9]


def changed_inputs(monkeypatch, name, change):
    """Let one of the inputs that we build be another where tokens are dropped."""
    build = Adapter.build

    def faulty(self, encoded, *args, **kwargs):
        plan = build(self, encoded, *args, **kwargs)
        if (plan.kept_positions >= 0).sum() == encoded.attention_mask.sum():
            return plan
        return replace(plan, inputs=plan.inputs | {name: change(plan.inputs[name].clone())})

    monkeypatch.setattr(Adapter, "build", faulty)


def leaked_pad(monkeypatch):
    changed_inputs(monkeypatch, "attention_mask", lambda mask: mask.fill_(1))


def position_off_by_one(monkeypatch):
    """The last words, all after the video, are placed one further."""

    def moved(positions):
        positions[..., -5:] += 1
        return positions

    changed_inputs(monkeypatch, "position_ids", moved)


def wrong_frame_block(monkeypatch):
    """Blocks begin and end one token late."""
    changed_inputs(monkeypatch, "mm_token_type_ids", lambda kinds: kinds.roll(1, -1))


def stale_conv_state(monkeypatch):
    """The state that a prompt leaves is read at every later step, and never renewed."""
    step = qwen3_5.causal_conv1d_update
    monkeypatch.setattr(qwen3_5, "causal_conv1d_update", lambda states, conv, *rest: step(states, conv.clone(), *rest))


def missing_per_layer_input(monkeypatch):
    """While a session is open, one word of a prompt has none."""
    attached = Case.attached

    @contextmanager
    def faulty(self, **options):
        text = self.adapter.language_model
        looked_up = text.get_per_layer_inputs

        def lookup(*args):
            found = looked_up(*args)
            if found.shape[1] > 1:
                found[:, -5] = 0
            return found

        with attached(self, **options) as session:
            text.get_per_layer_inputs = lookup
            try:
                yield session
            finally:
                del text.get_per_layer_inputs

    monkeypatch.setattr(Case, "attached", faulty)


def checked(family, calls=CALLS):
    kind = tiny(family)
    check_family(kind.model(0, kind.layers), kind.inputs(BATCH, WORDS, "left"), calls=calls)


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4"])
def test_without_a_fault_the_check_passes(family):
    checked(family)


@pytest.mark.parametrize(
    ("family", "fault", "call"),
    [
        ("qwen3_5", leaked_pad, "prefill logits"),
        ("qwen3_5", stale_conv_state, "8 greedy tokens"),
        ("qwen3_5", position_off_by_one, "prefill logits"),
        ("gemma4", leaked_pad, "prefill logits"),
        ("gemma4", position_off_by_one, "prefill logits"),
        ("gemma4", wrong_frame_block, "prefill logits"),
        ("gemma4", missing_per_layer_input, "prefill logits"),
    ],
)
def test_each_fault_is_caught(family, fault, call, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(CheckFailure, match=rf"{family}: .*{call} differs by"):
        checked(family, [call])


def test_text_that_does_not_reach_the_last_kept_token_is_caught():
    kind = tiny("exaone4_5")
    config = copy.deepcopy(kind.model(0, 2).config)
    # Two layers that see 4 tokens reach 6 back; the last kept token lies behind 9 words.
    config.text_config.layer_types, config.text_config.sliding_window = ["sliding_attention"] * 2, 4
    model = type(kind.model(0, 2))(config).eval()
    with pytest.raises(CheckFailure, match="the last logits of prompt 0 do not depend on the last video token"):
        check_family(model, kind.inputs([[2]], [9], "left"))
