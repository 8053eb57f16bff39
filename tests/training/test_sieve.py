"""Sieve: one policy for every budget, with the question or without it, trained without answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import vidsieve
from vidsieve.adapters.pruning import adapter_for
from vidsieve.cli.main import app
from vidsieve.compressors.sieve import Sieve, SievePolicy
from vidsieve.errors import PolicyError, TrainingError, UnknownNameError
from vidsieve.evaluation import experiment
from vidsieve.evaluation.conditions import label_of, named_methods
from vidsieve.evaluation.tasks.testbed import ScenesTask, scene_conditions
from vidsieve.loading import shipped_policy
from vidsieve.testbed.files import write_scenes
from vidsieve.testing import make_video
from vidsieve.testing.checks import WIDTH
from vidsieve.training.controls import teacher_scores
from vidsieve.training.data.encodings import EncodingCache
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.recipes import train_policy
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.settings import SETTINGS, SieveConfig
from vidsieve.training.sieve import SieveTrainer
from vidsieve.training.sources import Files
from vidsieve.types import Need, Selection, TokenGrid

FEW = {"steps": 2, "prompts_per_step": 3, "token_rollouts": 4, "eval_prompts": 0}
ANSWERS = {"taught": False, "blind_reward": "answer"}


@pytest.fixture
def policy():
    policy = SievePolicy.start(WIDTH, "none", match_width=8, width=8)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.5, generator=draw)
    return policy.eval()


def asking(video, seed):
    words = torch.randn(video.prompt.embeds.shape, generator=torch.Generator().manual_seed(seed))
    embeds = torch.where(video.prompt.question_mask[:, None], words, video.prompt.embeds)
    return replace(video, prompt=replace(video.prompt, embeds=embeds))


def test_the_switch_decides_if_the_question_is_read(policy):
    video = make_video(TokenGrid(4, 3, 3))
    one, other = asking(video, 1), asking(video, 2)
    with_it, without = Sieve(policy=policy), Sieve(policy=policy, variant="blind")
    assert not torch.equal(with_it.score(one), with_it.score(other))
    assert torch.equal(without.score(one), without.score(other))
    assert torch.equal(without.score(one), without.score(replace(video, prompt=None)))
    assert (with_it.needs, without.needs) == ({Need.QUESTION}, frozenset())
    with pytest.raises(PolicyError, match="choose variant 'blind'"):
        policy(replace(video, prompt=None), 0.1)


def test_the_policy_knows_the_budget(policy):
    """At another retention tokens come in another order; without the budget's weights they do not."""
    video = make_video(TokenGrid(4, 3, 3))
    few, many = Sieve(policy=policy, retention=0.1), Sieve(policy=policy, retention=0.8)
    assert not torch.equal(few.score(video).argsort(), many.score(video).argsort())
    with torch.no_grad():
        policy.scorer.budget.weight[:, 0] = 0
    assert torch.equal(few.score(video), many.score(video))


def test_a_saved_policy_is_loaded_with_its_switch(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    video = make_video(TokenGrid(4, 3, 3))
    wanted = Sieve(policy=policy, retention=0.2, variant="blind").score(video)
    named = f"{tmp_path}:blind"
    for loaded in (
        vidsieve.load(tmp_path, variant="blind"),
        vidsieve.load(named),
        named_methods([named])[named],
        vidsieve.load(f"reuse+{named}"),
    ):
        assert torch.equal(loaded.with_retention(0.2).score(video), wanted)
    assert label_of(named) == named
    with pytest.raises(PolicyError, match="names a variant, and variant='ours' another"):
        vidsieve.load(named, variant="ours")
    with pytest.raises(UnknownNameError, match="blnd"):
        vidsieve.load(f"{tmp_path}:blnd")


def test_a_folder_with_its_switch_is_a_name_on_the_command_line(tmp_path):
    shutil.copytree(shipped_policy("sieve"), tmp_path / "own")
    arguments = ["eval", "testbed", "--questions", "2", "--retention", "0.1", "--threads", "1", "--methods"]
    done = CliRunner().invoke(app, [*arguments, f"{tmp_path / 'own'}:blind", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert ("sieve", "blind") in {(row["method"], row["variant"]) for row in rows}, done.output
    missing = CliRunner().invoke(app, [*arguments, f"{tmp_path / 'none'}:blind"])
    assert "no policy in" in str(missing.exception)


def test_rollouts_keep_the_fraction_that_the_policy_was_told(testbed, tmp_path, monkeypatch):
    told, kept, original = [], [], SieveTrainer.token_masks

    def run_policy(self, video, rate, asked):
        told.append((rate, asked))
        return self.policy(video, rate, asked)

    def token_masks(self, *args):
        masks = original(self, *args)
        kept.append(float(masks.float().mean()))
        return masks

    monkeypatch.setattr(SieveTrainer, "run_policy", run_policy)
    monkeypatch.setattr(SieveTrainer, "token_masks", token_masks)
    train_policy("sieve", *testbed, tmp_path, FEW | ANSWERS | {"prompts_per_step": 12})
    drawn, other = told[::2], told[1::2]
    assert [(rate, not asked) for rate, asked in drawn] == other, "every prompt teaches both readings, at one rate"
    rates = [rate for rate, _ in drawn]
    assert 0.06 <= min(rates) < 0.08 and 0.11 < max(rates) <= 0.15
    assert kept == pytest.approx(rates, abs=0.5 / 36)
    assert 6 <= sum(asked for _, asked in drawn) <= 18, "half of the rollouts are drawn without the question"


def trainer_of(testbed, folder, **settings):
    """Return a trainer whose policy reads the question."""
    adapter = adapter_for(testbed[0])
    policy = SievePolicy.start(adapter.hidden_size, "none", seed=1)
    with torch.no_grad():
        policy.scorer.query.weight.normal_(0, 0.02)
    config = SieveConfig(**SETTINGS["sieve", "ours"] | FEW | settings)
    prompts = ScenePrompts(adapter, testbed[1], seed=3, captioned=config.captioned)
    return SieveTrainer(adapter, policy, config, prompts.choice, folder)


def rewarded_unequally(trainer, asked=None):
    """Return a prompt whose rollouts have different rewards, its loss, its rollouts and their advantages.

    `asked` names the reading that draws them, where that is not always the same.
    """
    for number in range(40):
        prompt = trainer.prepare(trainer.data(number))
        loss, known = trainer.train_step(prompt).loss, prompt.memory["tokens"]
        if not bool((known.rewards == known.rewards[0]).all()) and asked in (None, prompt.asked):
            break
    return prompt, loss, known, (known.rewards - known.rewards.mean()) / known.rewards.std(correction=0)


def check_gradients(policy, loss, wanted):
    found, expected = (torch.autograd.grad(part, policy.parameters(), allow_unused=True) for part in (loss, wanted))
    assert any(gradient is not None and float(gradient.abs().max()) > 0 for gradient in found)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_a_group_teaches_the_reading_that_did_not_draw_it(testbed, tmp_path, dropped):
    """A prompt's gradient: plain CPO for one reading, and REINFORCE on the same masks for the other."""
    trainer = trainer_of(testbed, tmp_path, **ANSWERS, question_dropped=dropped, score_decay=0.0)
    policy = trainer.policy
    prompt, loss, known, advantage = rewarded_unequally(trainer)
    video, wanted = prompt.rollouts.video(frozenset({Need.QUESTION})), torch.tensor(0.0)
    for asked in (True, False):
        logits = policy(video, prompt.ratio, asked)[0].log_softmax(1)
        chosen = torch.where(known.masks, logits[:, 1], logits[:, 0])  # (G, N)
        wanted = wanted - (advantage[:, None] * chosen).mean()
    check_gradients(policy, loss, wanted)


def test_distillation_teaches_both_readings(testbed, tmp_path):
    """A prompt's loss: the cross-entropy against the teacher's tokens and frames, of either reading."""
    trainer = trainer_of(testbed, tmp_path, **ANSWERS, warmup_steps=1)
    policy = trainer.policy
    prompt = trainer.prepare(trainer.data(0))
    found = float(trainer.train_step(prompt).loss.detach())
    video = prompt.rollouts.video(frozenset({Need.QUESTION}))
    teacher = teacher_scores(prompt.rollouts, "first_look").softmax(0)
    wanted: list[float] = []
    for asked in (True, False):
        out = policy(video, prompt.ratio, asked)
        tokens, frames = ((logits[:, 1] - logits[:, 0]).log_softmax(0) for logits in out)
        of_frames = teacher.view(len(frames), -1).sum(1)
        wanted += [-float((part * log).sum().detach()) for part, log in ((teacher, tokens), (of_frames, frames))]
    assert found == pytest.approx(sum(wanted) / video.num_tokens, rel=1e-5), "of the size of CPO's"
    assert wanted[0] != pytest.approx(wanted[2], rel=1e-3), "the readings differ"


@pytest.mark.parametrize("reward", ["answer", "caption"])
def test_a_taught_question_leaves_rewards_to_the_other_reading(testbed, tmp_path, reward):
    """A prompt's gradient: plain CPO without the question, and the teacher's with it, as a mean over tokens."""
    trainer = trainer_of(testbed, tmp_path, blind_reward=reward, score_decay=0.0)
    policy = trainer.policy
    prompt, loss, known, advantage = rewarded_unequally(trainer)
    video = prompt.rollouts.video(frozenset({Need.QUESTION}))
    logits = policy(video, prompt.ratio, False)[0].log_softmax(1)
    wanted = -(advantage[:, None] * torch.where(known.masks, logits[:, 1], logits[:, 0])).mean()
    teacher = teacher_scores(prompt.rollouts, "first_look").softmax(0)
    for target, out in zip((teacher, teacher.view(16, -1).sum(1)), policy(video, prompt.ratio, True), strict=True):
        wanted = wanted - (target * (out[:, 1] - out[:, 0]).log_softmax(0)).sum() / video.num_tokens
    check_gradients(policy, loss, wanted)


@torch.no_grad()
def caption_reward(trainer, caption, mask):
    """Return the caption's mean log-probability under one mask, read token by token from the LLM's own logits."""
    rollouts, words = Rollouts(trainer.adapter, caption.inputs), int((caption.inputs["labels"] != -100).sum())
    logits, labels = rollouts.prefill([Selection(mask.nonzero().flatten())], span=words + 1)
    said = labels[0, -words:].tolist()
    return sum(float(at.log_softmax(0)[word]) for at, word in zip(logits[0, :-1], said, strict=True)) / words


def test_a_caption_rewards_the_reading_without_the_question(testbed, tmp_path):
    trainer = trainer_of(testbed, tmp_path)
    prompt, _, known, _ = rewarded_unequally(trainer)
    found = [caption_reward(trainer, prompt.sample.caption, mask) for mask in known.masks]
    assert known.rewards.tolist() == pytest.approx(found, rel=1e-4) and max(found) < 0
    assert "right" not in trainer.train_step(trainer.prepare(trainer.data(0))).metrics
    with pytest.raises(TrainingError, match="needs a caption with every question"):
        trainer.train_step(trainer.prepare(replace(trainer.data(0), caption=None)))


@pytest.mark.parametrize("asked", [True, False])
def test_captions_reward_without_the_question_and_answers_with_it(testbed, tmp_path, asked):
    """A prompt's gradient: plain CPO for the reading that drew the masks, and nothing for the other one."""
    trainer = trainer_of(testbed, tmp_path, taught=False, score_decay=0.0)
    policy = trainer.policy
    prompt, loss, known, advantage = rewarded_unequally(trainer, asked)
    assert prompt.asked == asked
    assert set(known.rewards.tolist()) <= {0.0, 1.0} if asked else float(known.rewards.max()) < 0
    logits = policy(prompt.rollouts.video(frozenset({Need.QUESTION})), prompt.ratio, asked)[0].log_softmax(1)
    chosen = torch.where(known.masks, logits[:, 1], logits[:, 0])  # (G, N)
    check_gradients(policy, loss, -(advantage[:, None] * chosen).mean())


def rows_of(folder, captions):
    """Return a file of two scenes' questions, and rows of their own with captions of the first `captions` scenes."""
    write_scenes(folder, world="dense", seed=2, scenes=2)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    described = [row for row in rows if "caption" in row][:captions]
    rows = [row for row in rows if "question" in row] + described
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_a_file_gives_questions_and_captions_of_the_same_videos(testbed, tmp_path, cached, joined):
    """A caption is in the question's row or the first of its video; each prompt's video is encoded once."""
    adapter = adapter_for(testbed[0])
    path, (*questions, other, caption) = rows_of(tmp_path, 2)
    asked = next(row for row in questions if row["video"] == caption["video"])
    rows = [other, caption, caption | {"caption": "nothing ."}, asked]
    if joined:
        rows = [other, caption | {"caption": "nothing ."}, asked | caption]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = FilePrompts(adapter, testbed[1], path).caption
    (whole,) = (found for found in map(whole, range(3)) if found.key == f"{path}:{2 if joined else 1}")
    cache = EncodingCache(tmp_path / "cache", adapter, testbed[1], 16) if cached else None
    prompts = FilePrompts(adapter, testbed[1], path, captioned=True, cache=cache)
    config = SieveConfig(**SETTINGS["sieve", "ours"] | FEW)
    policy = SievePolicy.start(adapter.hidden_size, adapter.family, seed=1)
    trainer = SieveTrainer(adapter, policy, config, prompts.choice, tmp_path / "run")
    encoded: list[int] = []
    hook = testbed[0].model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    prompt = trainer.prepare(trainer.data(0))
    trainer.train_step(prompt)
    hook.remove()
    assert len(encoded) == 1
    labels = prompt.sample.caption.inputs["labels"]
    assert testbed[1].tokenizer.decode(labels[labels != -100]).strip().startswith(caption["caption"])
    known = prompt.memory["tokens"]
    assert known.rewards.tolist() == pytest.approx([caption_reward(trainer, whole, m) for m in known.masks], rel=1e-4)


def test_a_caption_is_written_as_the_model_would_write_it(testbed, tmp_path, monkeypatch):
    """After a line break without a blank, and none before the end: either would be an improbable token of its own."""
    path, (*_, caption) = rows_of(tmp_path, 1)
    path.write_text(json.dumps(caption | {"caption": " a dog . "}) + "\n")
    prompts, kind, seen = FilePrompts(adapter_for(testbed[0]), testbed[1], path), type(testbed[1].tokenizer), []
    original = kind.__call__

    def noted(self, text, *arguments, **options):
        seen.append(text)
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", noted)
    for last, written in (("assistant\n", "a dog .<|im_end|>"), ("assistant", " a dog .<|im_end|>")):
        monkeypatch.setattr(kind, "decode", lambda self, ids, text=last: text)
        ids = prompts.caption(0).inputs
        assert seen[-1] == written and int((ids["labels"] != -100).sum()) == 4


def test_what_has_no_caption_or_no_question_is_left_out(testbed, tmp_path):
    """Such captions are no videos of the run either: other files may have them, and none is held out."""
    few = {"steps": 1, "prompts_per_step": 2, "token_rollouts": 4, "eval_prompts": 2}
    *questions, first, second = rows_of(tmp_path, 2)[1]
    asked = [row for row in questions if row["video"] == first["video"]]
    rows, held = [*asked, first, second], [row for row in questions if row["video"] == second["video"]]
    for name, part in (("rows", rows), ("held", held), ("lacking", [*questions, first]), ("bare", questions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def trained(name, **settings):
        files = Files(tmp_path / f"{name}.jsonl", settings.pop("eval_data", None))
        return train_policy("sieve", *testbed, tmp_path / name, few | settings, files=files)["skipped"]["left_out"]

    assert trained("rows", eval_data=tmp_path / "held.jsonl") == {"a caption of a video without a question": 1}
    assert trained("lacking") == {"a question about a video without a caption": len(held)}
    none = (
        r"no rows with a question about a video with a caption, as .* \(or set it to 'answer'\): \d+ × a question about"
    )
    with pytest.raises(TrainingError, match=none):
        trained("bare")
    with pytest.raises(TrainingError, match=r"rows.jsonl shows a single video, and cannot be parted"):
        train_policy(
            "sieve", *testbed, tmp_path / "parted", few | {"hold_out": 0.5}, files=Files(tmp_path / "rows.jsonl")
        )


def test_iterations_read_a_prompt_one_way(testbed, tmp_path, monkeypatch):
    asked, original = [], SieveTrainer.token_masks

    def token_masks(self, prompt, *args):
        asked.append((id(prompt), prompt.asked))
        return original(self, prompt, *args)

    monkeypatch.setattr(SieveTrainer, "token_masks", token_masks)
    train_policy("sieve", *testbed, tmp_path, FEW | ANSWERS | {"iterations": 4, "steps": 1})
    assert len(asked) == 12 and len(set(asked)) == 3


def test_agreement_reads_no_label(testbed, tmp_path, monkeypatch):
    """The reward is 1 for the answer under all tokens, from a loop of our own; wrong labels change nothing."""
    model, processor = testbed
    prompts, rewards, original = ScenePrompts(adapter_for(model), processor, seed=3), [], SieveTrainer.rewards

    def noted(self, prompt, masks):
        found = original(self, prompt, masks)
        rewards.append((prompt.sample, masks, found[0]))
        return found

    monkeypatch.setattr(SieveTrainer, "rewards", noted)
    train_policy("sieve", *testbed, tmp_path / "right", FEW | ANSWERS | {"steps": 1})
    for sample, masks, found in rewards:
        rollouts = Rollouts(prompts.adapter, sample.inputs)
        everything = torch.ones(1, masks.shape[1], dtype=torch.bool)
        answer = rollouts.option_logits(everything, sample.option_ids).argmax()
        wanted = [float(rollouts.option_logits(mask[None], sample.option_ids).argmax() == answer) for mask in masks]
        assert found.tolist() == wanted

    choice = ScenePrompts.choice
    monkeypatch.setattr(
        ScenePrompts, "choice", lambda self, n: replace(choice(self, n), answer=(choice(self, n).answer + 1) % 4)
    )
    train_policy("sieve", *testbed, tmp_path / "wrong", FEW | ANSWERS | {"steps": 1})
    weights = [(tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("right", "wrong")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"depth": 2}, "depth is CaCoVID's"),
        ({"ratio": 0.1}, "ratio is CaCoVID's"),
        ({"rate_low": 0.0, "rate_high": 0.0}, "a range of rates"),
        ({"taught": False, "question_dropped": 1.0}, "nothing teaches the reading with the question"),
    ],
)
def test_settings_of_another_network_are_refused(testbed, tmp_path, settings, text):
    with pytest.raises(TrainingError, match=text):
        train_policy("sieve", *testbed, tmp_path, FEW | settings)


def test_the_shipped_policy_serves_both_variants_and_finds_what_is_asked(testbed):
    """At a tenth of the tokens it answers better than without the question, and both better than random tokens."""
    methods = named_methods(["sieve", "sieve:blind", "random"], "testbed")
    assert [method.needs for method in methods.values()] == [frozenset({Need.QUESTION}), frozenset(), frozenset()]
    task = ScenesTask(adapter_for(testbed[0]), testbed[1], "dense", 77, 48)
    marks = task.marks(experiment.measured(task, scene_conditions(methods, [0.1])))
    right = [sum(values) for key, values in marks.items() if key != "full/-/1"]
    assert right[0] >= right[1] + 6 and right[1] >= right[2], right
    with pytest.raises(PolicyError, match="no policy of sieve:blind comes with the package for testbed:shallow"):
        named_methods(["sieve:blind"], "testbed:shallow")
