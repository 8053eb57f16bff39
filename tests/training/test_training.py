"""The trainers on the shipped model: they learn, repeat, resume, and stop before harm is done."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vidsieve import load
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.score import ScorePolicy
from vidsieve.errors import (
    OutputError,
    TrainingError,
    UnknownNameError,
    UnsupportedCallError,
    VidsieveError,
)
from vidsieve.testbed.world import make_cast
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.reference import reference_logits
from vidsieve.testing.tiny_models import FAMILIES
from vidsieve.training import cacovid as rl_cacovid
from vidsieve.training.cacovid import CaCoVIDTrainer
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.judging import judge
from vidsieve.training.losses import action_log_probs
from vidsieve.training.recipes import train_policy
from vidsieve.training.rollouts import Packing, Rollouts
from vidsieve.training.run_folder import CHECKPOINT, METRICS, PREVIOUS, read_metrics
from vidsieve.training.score import ScoreTrainer
from vidsieve.training.settings import CaCoVIDConfig, ScoreConfig, config_of
from vidsieve.training.sources import Files
from vidsieve.training.trainer import StepResult, Trainer
from vidsieve.types import Need, Selection

QUICK = {"steps": 4, "prompts_per_step": 2, "log_every": 1, "save_every": 2, "seed": 5, "eval_prompts": 0}


def train(testbed, folder, method="score", variant="ours", resume=False, **settings):
    model, processor = testbed
    few = {"rollouts": 4} if method == "score" else {}
    return train_policy(
        method, model, processor, folder, QUICK | few | settings, variant=variant, model_name="testbed", resume=resume
    )


@pytest.mark.parametrize("method", ["cacovid", "score"])
@pytest.mark.parametrize("variant", ["ours", "paper"])
def test_a_short_run_leaves_everything_behind(testbed, tmp_path, method, variant):
    record = train(testbed, tmp_path, method, variant)
    assert record["steps"] == 4 and record["settings"]["seed"] == 5
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "gradient_norm", "prompts_per_second", "minutes"} <= lines[0].keys()
    policy = load(tmp_path / "policy", retention=0.1)
    assert policy.name == method and policy.variant == variant
    saved = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert saved["training"]["prompts"] == 8 and saved["base_model"] == "testbed"
    assert saved["family"] == "llava_onevision"


def test_runs_are_not_overwritten_and_settings_not_mixed(testbed, tmp_path):
    train(testbed, tmp_path)
    with pytest.raises(OutputError, match="--resume"):
        train(testbed, tmp_path)
    with pytest.raises(TrainingError, match="lr was"):
        train(testbed, tmp_path, resume=True, lr=0.5)
    with pytest.raises(TrainingError, match="give more steps"):
        train(testbed, tmp_path, resume=True, steps=1)
    for name in (CHECKPOINT, PREVIOUS):
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="no readable checkpoint"):
        train(testbed, tmp_path, resume=True)
    with pytest.raises(OutputError, match="cannot write"):
        train(testbed, "/proc/nowhere")
    with pytest.raises(UnknownNameError, match="variant of score"):
        train(testbed, tmp_path / "x", variant="official")


REPLAY = {"iterations": 3, "dynamic_ratio": True}


@pytest.mark.parametrize(("method", "more"), [("cacovid", {}), ("cacovid", REPLAY), ("score", {})])
def test_a_run_that_breaks_off_ends_like_a_straight_one(testbed, tmp_path, monkeypatch, method, more):
    """Stopped after step 3 with a checkpoint at 2: metrics of step 3 are not logged twice, weights are the same."""
    train(testbed, tmp_path / "straight", method, **more)
    calls = []
    original = Trainer._optimise

    def breaks(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "_optimise", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(testbed, tmp_path / "broken", method, **more)
    monkeypatch.undo()
    assert [line["step"] for line in read_metrics(tmp_path / "broken")] == [1, 2, 3]
    train(testbed, tmp_path / "broken", method, resume=True, **more)
    a, b = (load(tmp_path / name / "policy").policy.state_dict() for name in ("straight", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    clock = {"minutes", "prompts_per_second", "rollouts_per_second"}
    first, second = (
        [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(tmp_path / name)]
        for name in ("straight", "broken")
    )
    assert first == second


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(testbed, tmp_path, monkeypatch, ctrl_c):
    train(testbed, tmp_path / "straight", save_every=100)
    original = Trainer._optimise

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "_optimise", interrupted)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 4; --resume"):
        train(testbed, tmp_path / "broken", save_every=100)
    monkeypatch.undo()
    train(testbed, tmp_path / "broken", save_every=100, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "broken")] == [1, 2, 3, 4]
    a, b = (load(tmp_path / name / "policy").policy.state_dict() for name in ("straight", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_goes_on_only_with_its_own_model_and_data(testbed, tmp_path):
    with pytest.raises(OutputError, match="holds no run"):
        train(testbed, tmp_path / "none", resume=True)
    train(testbed, tmp_path / "run", steps=1)
    model, processor = testbed
    with pytest.raises(TrainingError, match="model was 'testbed', is 'another'"):
        train_policy("score", model, processor, tmp_path / "run", QUICK, model_name="another", resume=True)
    with pytest.raises(TrainingError, match="variant was 'ours', is 'paper'"):
        train(testbed, tmp_path / "run", variant="paper", resume=True, **QUICK | {"advantage": "group"})


def test_a_run_that_cannot_begin_leaves_nothing(testbed, tmp_path, monkeypatch):
    monkeypatch.setattr(ScoreTrainer, "train_step", lambda self, sample: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(testbed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (ScoreConfig, "steps", 0),
        (ScoreConfig, "prompts_per_step", 0),
        (ScoreConfig, "log_every", 0),
        (ScoreConfig, "lr", float("nan")),
        (ScoreConfig, "rollouts", 1),
        (ScoreConfig, "hidden", 0),
        (ScoreConfig, "rate_high", 2.0),
        (ScoreConfig, "rate_low", 0.1),
        (CaCoVIDConfig, "ratio", 3.0),
        (CaCoVIDConfig, "iterations", 0),
        (CaCoVIDConfig, "dynamic_ratio", True),
        (CaCoVIDConfig, "ratio_low", 0.9),
        (CaCoVIDConfig, "width", 0.0),
        (CaCoVIDConfig, "token_rollouts", -3),
        (CaCoVIDConfig, "frame_rollouts", 1),
    ],
)
def test_settings_out_of_range_are_refused(config, field, value):
    with pytest.raises(TrainingError, match=field):
        config(**{field: value})


def test_settings_in_python_are_checked_as_those_of_the_command(testbed, tmp_path):
    for method, settings, said in (
        ("cacovid", {"lr": 0.1}, "unknown setting 'lr'. Did you mean 'body_lr' or 'head_lr'"),
        ("cacovid", {"steps": 1.5}, "steps must be of type int, got 1.5"),  # no step is the last one
        ("cacovid", {"replay": 0}, "replay must be of type bool, got 0"),
        ("grpo", {}, "unknown trainer 'grpo'"),
    ):
        with pytest.raises(VidsieveError, match=re.escape(said)):
            train_policy(method, *testbed, tmp_path / "run", settings)
    with pytest.raises(TrainingError, match=r"files must be vidsieve\.training\..*Files\(data=…\), got \{"):
        train_policy("cacovid", *testbed, tmp_path / "run", {}, files={"data": "rows.jsonl"})
    assert config_of("cacovid", "ours", {"width": 3}).width == 3
    assert Files("rows.jsonl").data == Path("rows.jsonl") and Files().data is None


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(testbed, tmp_path, monkeypatch, where):
    original, calls = ScoreTrainer.train_step, []

    def poisoned(self, sample):
        calls.append(1)
        result = original(self, sample)
        if len(calls) < 6:
            return result
        if where == "loss":
            return StepResult(result.loss * float("nan"), result.metrics)
        weight = self.policy.out.bias
        return StepResult(result.loss + (weight - weight.detach()).abs().sqrt().sum(), result.metrics)

    monkeypatch.setattr(ScoreTrainer, "train_step", poisoned)
    with pytest.raises(TrainingError, match="step 3 is"):
        train(testbed, tmp_path)
    assert not (tmp_path / "policy").exists()
    monkeypatch.undo()
    train(testbed, tmp_path, resume=True)
    assert all(torch.isfinite(v).all() for v in load(tmp_path / "policy").policy.state_dict().values())
    assert (tmp_path / METRICS).exists()


def test_max_minutes_stops_in_good_order(testbed, tmp_path):
    record = train(testbed, tmp_path, steps=10_000, max_minutes=0.05)
    assert 0 < record["steps"] < 10_000
    assert load(tmp_path / "policy").policy is not None


def object_share(policy, prompts, seed, scenes=4):
    """Return the share of (object token, other token) pairs that a question-free policy puts in the right order."""
    right = []
    for index in range(scenes):
        video = Rollouts(prompts.adapter, prompts.caption(index).inputs).video()
        things = [o for o in make_cast("dense", seed, index).objects if o.kind != "glyph"]
        shown = torch.zeros(video.num_tokens, dtype=torch.bool)
        shown[[token for thing in things for token in thing.tokens()]] = True
        with torch.no_grad():
            logits = policy(video)
        right.append((logits[shown][:, None] > logits[~shown]).float().mean())
    return float(torch.stack(right).mean())


@pytest.mark.slow
def test_score_learns_what_objects_are(testbed, tmp_path):
    """Never told what an object is, only how well captions are predicted."""
    model, processor = testbed
    prompts = ScenePrompts(adapter_for(model), processor, seed=61)
    train(testbed, tmp_path, rollouts=16, steps=8, prompts_per_step=8, log_every=4, save_every=8)
    start = ScorePolicy.start(128, "llava_onevision", hidden=256, seed=5).eval()
    before, after = (object_share(p, prompts, 61) for p in (start, load(tmp_path / "policy").policy))
    assert after > max(0.7, before + 0.15), (before, after)


def test_cacovid_learns_the_answers_of_few_prompts(testbed, tmp_path, monkeypatch):
    """Eight prompts again and again: the policy finds the tokens that each of them needs, from nothing."""
    choice = ScenePrompts.choice
    monkeypatch.setattr(ScenePrompts, "choice", lambda self, number: choice(self, number % 8))
    train(testbed, tmp_path, "cacovid", steps=20, prompts_per_step=8, log_every=4, save_every=20)
    right = [line["right"] for line in read_metrics(tmp_path)]
    assert right[0] < 0.75 and right[-1] > 0.95, right


def test_the_rate_of_a_group_is_not_the_policys_to_choose(testbed, tmp_path):
    """With a given rate the loss has no gradient along the logits' mean; on its own the policy does choose it."""
    model, processor = testbed
    adapter = adapter_for(model)
    sample = ScenePrompts(adapter, processor, seed=3).caption(0)
    for rates, moves in (((0.1, 0.1), False), ((0.0, 0.0), True)):
        policy = ScorePolicy.start(128, "llava_onevision", hidden=16, seed=5)
        config = ScoreConfig(advantage="group", rate_low=rates[0], rate_high=rates[1])
        ScoreTrainer(adapter, policy, config, lambda number: sample, tmp_path).train_step(sample).loss.backward()
        assert (abs(float(policy.out.bias.grad)) > 1e-6) == moves


def test_samples_repeat_and_hold_what_they_say(testbed):
    model, processor = testbed
    prompts = ScenePrompts(adapter_for(model), processor, seed=3)
    again = ScenePrompts(adapter_for(model), processor, seed=3)
    for number in (0, 5, 40, 300):
        a, b = prompts.choice(number), again.choice(number)
        assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) and a.answer == b.answer
        features = [x.inputs["mm_encoder_outputs"]["video"].pooler_output for x in (a, b)]
        assert torch.equal(*features)
    caption = prompts.caption(2).inputs
    said = caption["input_ids"][caption["labels"] != -100]
    assert processor.tokenizer.decode(said).startswith("the ") and said[-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rollouts_equal_the_masked_reference(family):
    """G masks of different sizes, packed: option logits and caption cross-entropy are those of one at a time."""
    model = FAMILIES[family]()
    adapter, inputs = adapter_for(model), configuration(family, "batch 1")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    draw = torch.Generator().manual_seed(0)
    total = adapter.encode(inputs).videos[0].features.grid.num_tokens
    masks = torch.rand(7, total, generator=draw) < torch.linspace(0.1, 1.0, 7)[:, None]
    masks[0, :] = False
    masks[0, 3] = True
    options = torch.tensor([5, 6, 7])
    for max_tokens in (10_000, 120):
        rollouts = Rollouts(adapter, inputs | {"labels": labels}, Packing(model, max_tokens))
        logits, ce = rollouts.option_logits(masks, options), rollouts.caption_ce(masks)
        for g, mask in enumerate(masks):
            with torch.no_grad():
                wanted = reference_logits(adapter, inputs, [Selection(mask.nonzero().flatten())])[0]
            assert torch.allclose(logits[g], wanted[-1, options], atol=1e-4)
            loss = torch.nn.functional.cross_entropy(wanted[-5:-1], inputs["input_ids"][0, -4:])
            assert float(ce[g]) == pytest.approx(float(loss), abs=1e-4)
    with pytest.raises(UnsupportedCallError, match="needs labels"):
        Rollouts(adapter, inputs).caption_ce(masks)
    with pytest.raises(UnsupportedCallError, match="one prompt with one video"):
        Rollouts(adapter, configuration(family, "ragged batch 2"))


def test_rollouts_give_policies_the_question(testbed):
    model, processor = testbed
    sample = ScenePrompts(adapter_for(model), processor, seed=3).choice(0)
    video = Rollouts(adapter_for(model), sample.inputs).video(frozenset({Need.QUESTION}))
    words = sample.inputs["input_ids"][0][video.prompt.question_mask]
    text = processor.tokenizer.decode(words)
    assert text.endswith("?") and "user" not in text and "<|im" not in text


def test_later_iterations_learn_from_earlier_rollouts_too(testbed, tmp_path, monkeypatch):
    """The second iteration's loss by hand: both groups in one advantage, each under the policy that drew it."""
    seen = []

    def noted(logits, old, masks, advantages, **options):
        seen.append((logits.detach(), old, masks, advantages, options))
        return original(logits, old, masks, advantages, **options)

    original = rl_cacovid.cpo_loss
    monkeypatch.setattr(rl_cacovid, "cpo_loss", noted)
    one = {"steps": 1, "prompts_per_step": 1, "iterations": 2, "frame_rollouts": 8, "head_lr": 0.01}
    train(testbed, tmp_path, "cacovid", variant="paper", **one)
    (first, *_), _, (second, old, masks, advantages, options) = seen[:3]
    assert len(seen[0][2]) == 24 and len(masks) == 48 and not torch.equal(first, second)
    assert torch.equal(masks[:24], seen[0][2]) and torch.equal(old[:24], seen[0][1])
    assert torch.allclose(old[24:], action_log_probs(second, masks[24:])), "fresh rollouts: the policy as it is now"
    assert not torch.allclose(old[:24], action_log_probs(second, masks[:24]))
    assert abs(float(advantages.mean())) < 1e-5, "one group of both iterations"
    total = 0.0
    for mask, weight, before in zip(masks, advantages, old, strict=True):
        for token, kept in enumerate(mask.tolist()):
            both = second[token].double().log_softmax(0)
            ratio = float((both[1 if kept else 0] - before[token].double()).exp())
            total -= min(ratio * float(weight), min(max(ratio, 0.8), 1.28) * float(weight))
    wanted = total / masks.numel()
    assert float(original(second, old, masks, advantages, **options)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("sampler", "ratio", "right", "wanted"),
    [
        ("ocss", 0.02, 0.9, 0.01),
        ("ocss", 0.02, 0.875, 0.02),
        ("ocss", 0.02, 0.1, 0.04),
        ("ocss", 0.02, 0.125, 0.02),
        ("ocss", 0.1, 0.0, 0.12),
        ("ocss", 0.006, 1.0, 0.005),
        ("ocss", 0.004, 1.0, 0.005),
        ("ocss", 0.5, 0.0, 0.5),
        ("official", 0.02, 0.875, 0.01),
        ("official", 0.02, 0.125, 0.04),
        ("official", 0.016, 1.0, 0.01),
    ],
)
def test_the_ratio_follows_how_often_the_model_is_right(sampler, ratio, right, wanted):
    """At least one token of the 200 a frame, or the release's .01, whose thresholds count too."""
    trainer = SimpleNamespace(config=CaCoVIDConfig(sampler=sampler))
    assert CaCoVIDTrainer.next_ratio(trainer, ratio, right, per_frame=200) == pytest.approx(wanted)


def test_without_frame_rollouts_only_tokens_are_learned(testbed, tmp_path):
    train(testbed, tmp_path, "cacovid", frame_rollouts=0)
    assert all(torch.isfinite(v).all() for v in load(tmp_path / "policy").policy.state_dict().values())


@pytest.mark.parametrize(
    ("body", "depth"), [("layer", 2), ("layer", 3), ("attention", 1), ("local", 2), ("question", 1)]
)
def test_bodies_start_as_the_llms_first_layers_and_train(testbed, tmp_path, body, depth):
    model, _ = testbed
    layers = {} if body == "question" else {"depth": depth, "body_lr": 0.0}
    train(
        testbed,
        tmp_path,
        "cacovid",
        variant="paper",
        body=body,
        **layers,
        steps=1,
        prompts_per_step=1,
        weight_decay=0.0,
    )
    policy = load(tmp_path / "policy").policy
    assert policy.body == body
    if body == "question":
        return
    assert len(policy.layers) == depth
    adapter = adapter_for(model)
    assert adapter.first_full_layer == 2, "the layers before slide, and do not see the whole prompt"
    for ours, theirs in zip(policy.layers, adapter.decoder_layers[2:], strict=False):
        weights = theirs.state_dict()
        assert all(torch.equal(value, weights[name].float()) for name, value in ours.state_dict().items())
    assert any("mlp" in name for name in dict(policy.layers.named_parameters())) == (body != "attention")


def test_depths_that_do_not_exist_are_refused(testbed, tmp_path):
    with pytest.raises(TrainingError, match="has 6 layers to start from"):
        train(testbed, tmp_path / "deep", "cacovid", variant="paper", depth=7)
    with pytest.raises(TrainingError, match="depth is for decoder layers, and body 'question' has none"):
        train(testbed, tmp_path / "question", "cacovid", depth=2)
    with pytest.raises(UnknownNameError, match="body"):
        train(testbed, tmp_path / "body", "cacovid", body="lager")
    assert not list(tmp_path.iterdir())


def test_generated_answers_are_those_of_generate_and_agree_with_the_best_option(testbed, tmp_path):
    """One prompt, many masks: packed greedy answers equal one-by-one ones, and say the option of the highest logit."""
    model, processor = testbed
    prompts = ScenePrompts(adapter_for(model), processor, seed=5)
    same, total = 0, 0
    for number in range(12):
        sample = prompts.choice(number)
        rollouts = Rollouts(prompts.adapter, sample.inputs, Packing(model, 900))
        masks = torch.rand(6, 576, generator=torch.Generator().manual_seed(number)) < 0.3
        said = processor.tokenizer.batch_decode(rollouts.generate(masks, 4), skip_special_tokens=True)
        for mask, text in zip(masks, said, strict=True):
            alone = prompts.adapter.build(rollouts.encoded, [[Selection(mask.nonzero().flatten())]])
            out = model.generate(**alone.inputs, max_new_tokens=4, do_sample=False)
            wanted = processor.tokenizer.decode(out[0, alone.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert text.strip() == wanted.strip()
        picked = rollouts.option_logits(masks, sample.option_ids).argmax(1)
        right = [judge(sample.kind, text, sample.truth) for text in said]
        same += sum(int(p == sample.answer) == r for p, r in zip(picked.tolist(), right, strict=True))
        total += len(masks)
    assert same / total > 0.95


def test_the_generate_reward_trains_on_questions_of_every_kind(testbed, tmp_path):
    from vidsieve.testbed.files import write_scenes

    write_scenes(tmp_path / "scenes", world="dense", seed=1, scenes=1)
    lines = [
        {"video": "scene-0000.mp4", "question": "how many ?", "answer": "3", "problem_type": "numerical"},
        {"video": "scene-0000.mp4", "question": "what colour ?", "options": ["red", "blue"], "answer": "red"},
    ]
    path = tmp_path / "scenes" / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    model, processor = testbed
    settings = QUICK | {"reward": "generate", "steps": 2, "token_rollouts": 4, "frame_rollouts": 0, "answer_tokens": 3}
    record = train_policy("cacovid", model, processor, tmp_path / "run", settings, files=Files(path))
    assert record["steps"] == 2 and 0 <= record["last_metrics"]["right"] <= 1
    prompts = FilePrompts(adapter_for(model), processor, path)
    assert len(prompts.choices) == 1, "the other rewards need options"
    assert len(FilePrompts(adapter_for(model), processor, path, kinds=None).choices) == 2
    path.write_text(json.dumps(lines[0] | {"problem_type": "numerics"}))
    with pytest.raises(TrainingError, match="problem_type: invalid enum value 'numerics', must be one of"):
        FilePrompts(adapter_for(model), processor, path)
