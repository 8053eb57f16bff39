"""Evaluation while training: other videos, the policy's own selection, the best policy kept."""

from __future__ import annotations

import json

import pytest
import torch

from vidsieve import load
from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import ModelError, TrainingError
from vidsieve.loading import load_model
from vidsieve.policies import read_config
from vidsieve.testbed.files import write_scenes
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.data.table import held_out, keys_of, load_rows
from vidsieve.training.heldout import Best
from vidsieve.training.recipes import train_policy
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.run_folder import read_metrics
from vidsieve.training.settings import CaCoVIDConfig, ScoreConfig
from vidsieve.training.sources import HELD_OUT_SEED, TRAINING_SEED, Files, source
from vidsieve.types import Selection

QUICK = {"prompts_per_step": 1, "log_every": 2, "save_every": 2, "seed": 5, "eval_prompts": 3, "eval_retention": 0.2}


def by_hand(testbed, method, policy):
    """Return the figure of a policy on the first three held-out prompts, by the calls that users make."""
    adapter = adapter_for(testbed[0])
    world = "dense" if method == "cacovid" else "sparse"
    prompts = ScenePrompts(adapter, testbed[1], seed=HELD_OUT_SEED, world=world)
    compressor = load(policy, retention=0.2)
    values = []
    for number in range(3):
        sample = prompts.choice(number) if method == "cacovid" else prompts.caption(number)
        rollouts = Rollouts(adapter, sample.inputs)
        chosen = compressor.compress(rollouts.video(compressor.needs))
        if method == "score":
            kept, full = rollouts.caption_ce([chosen, Selection(torch.arange(576))]).tolist()
            values.append(kept - full)
            continue
        pruned = adapter.build(rollouts.encoded, [[chosen]])
        with torch.no_grad():
            logits = testbed[0](**pruned.inputs).logits[0, -1, sample.option_ids]
        values.append(float(int(logits.argmax()) == sample.answer))
    return sum(values) / 3


@pytest.mark.parametrize(
    ("method", "metric", "better"), [("score", "eval_ce_excess", min), ("cacovid", "eval_accuracy", max)]
)
def test_the_best_policy_is_kept_beside_the_last(testbed, tmp_path, method, metric, better):
    rate = {"lr": 0.05, "schedule": "constant"} if method == "score" else {"head_lr": 0.02}
    record = train_policy(method, *testbed, tmp_path, QUICK | rate | {"steps": 5, "eval_every": 1})
    found = {line["step"]: line[metric] for line in read_metrics(tmp_path)}
    assert list(found) == [1, 2, 3, 4, 5]
    step = better(found, key=found.get)
    assert record["best"] == {"metric": metric, "value": pytest.approx(found[step], abs=1e-6), "step": step}
    best, last = (read_config(tmp_path / name).training for name in ("best", "policy"))
    assert best["steps"] == step and best["best"] == last["best"] and last["steps"] == 5
    for name, value in (("best", found[step]), ("policy", found[5])):
        assert by_hand(testbed, method, tmp_path / name) == pytest.approx(value, abs=1e-5)


def test_without_eval_every_the_end_is_evaluated(testbed, tmp_path):
    train_policy("score", *testbed, tmp_path, QUICK | {"steps": 3})
    assert ["eval_ce" in line for line in read_metrics(tmp_path)] == [False, True]


def test_best_takes_higher_accuracy_lower_cross_entropy_and_the_first_of_equals():
    best = Best()
    assert [best.improved_by({"eval_accuracy": v}, s) for s, v in enumerate([0.5, 0.4, 0.5, 0.6])] == [1, 0, 0, 1]
    best = Best()
    assert [best.improved_by({"eval_ce_excess": v}, s) for s, v in enumerate([0.5, 0.6, 0.4])] == [1, 0, 1]
    assert best.as_dict() == {"metric": "eval_ce_excess", "value": 0.4, "step": 2} and Best().as_dict() == {}


def test_scenes_of_training_and_benchmarks_are_never_held_out(testbed):
    assert HELD_OUT_SEED < TRAINING_SEED and HELD_OUT_SEED not in (9001, 9002, 9003)
    found = source(adapter_for(testbed[0]), testbed[1], ScoreConfig(seed=0), Files())
    assert found.prompts.seed == TRAINING_SEED and found.held_out.seed == HELD_OUT_SEED and found.count == 64


def test_files_are_split_by_video(testbed, tmp_path):
    rows = [
        {"video": f"{video}.mp4", "question": "?", "options": ["red", "blue"], "answer": "red"}
        for video in "abcdefgh"
        for _ in range(3)
    ]
    for row in rows:
        (tmp_path / row["video"]).touch()
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    adapter, processor = adapter_for(testbed[0]), testbed[1]
    found = source(adapter, processor, CaCoVIDConfig(hold_out=0.25), Files(path, None))
    train, held = ({r["video"] for r in prompts.choices} for prompts in (found.prompts, found.held_out))
    assert len(train) == 6 and len(held) == 2 and not train & held and found.count == 6
    assert held_out(load_rows(path), 0.25, path) == frozenset().union(*(keys_of({"video": video}) for video in held))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(rows[0]))
    with pytest.raises(TrainingError, match=r"other.jsonl and .*rows.jsonl have a video in common, first a.mp4"):
        source(adapter, processor, CaCoVIDConfig(), Files(path, other))
    with pytest.raises(TrainingError, match=r"give one of them"):
        source(adapter, processor, CaCoVIDConfig(hold_out=0.25), Files(path, other))
    with pytest.raises(TrainingError, match="hold_out is for the videos of --data, and none was given"):
        source(adapter, processor, CaCoVIDConfig(hold_out=0.25), Files(None, None))
    with pytest.raises(TrainingError, match="eval_every needs held-out videos: give --hold-out or --eval-data"):
        source(adapter, processor, CaCoVIDConfig(eval_every=5), Files(path, None))
    assert source(adapter, processor, CaCoVIDConfig(eval_every=5, hold_out=0.25), Files(path, None)).count == 6
    with pytest.raises(TrainingError, match=r"can be used: 24 × a question"):
        source(adapter, processor, ScoreConfig(hold_out=0.25), Files(path, None))
    with pytest.raises(TrainingError, match="shows a single video, and cannot be parted"):
        held_out(load_rows(other), 0.5, other)
    assert source(adapter, processor, CaCoVIDConfig(), Files(path, None)).count == 0
    assert isinstance(source(adapter, processor, CaCoVIDConfig(), Files(None, other)).held_out, FilePrompts)


def test_a_run_on_files_holds_videos_out(testbed, tmp_path):
    write_scenes(tmp_path / "scenes", world="dense", seed=1, scenes=2)
    data = tmp_path / "scenes" / "questions.jsonl"
    settings = QUICK | {"steps": 1, "hold_out": 0.5, "token_rollouts": 4, "frame_rollouts": 0}
    record = train_policy("cacovid", *testbed, tmp_path / "run", settings, files=Files(data))
    assert record["best"]["metric"] == "eval_accuracy" and 0 <= record["best"]["value"] <= 1


@pytest.mark.parametrize("method", ["score", "cacovid"])
def test_bf16_computes_in_it_and_keeps_float32_weights(testbed, tmp_path, monkeypatch, method):
    model, processor = load_model("testbed", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    seen = set()
    original = torch.nn.functional.linear

    def noted(*args):
        out = original(*args)
        if torch.is_grad_enabled():
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    settings = QUICK | {"steps": 2, "log_every": 1}
    if method == "cacovid":
        settings |= {"start": "first_look"}  # from nothing, all scores of the first step are zero
    train_policy(method, model, processor, tmp_path / "bf16", settings | {"precision": "bf16"})
    assert torch.bfloat16 in seen
    monkeypatch.undo()
    train_policy(method, *testbed, tmp_path / "fp32", settings)
    policy = load(tmp_path / "bf16" / "policy").policy
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    half, whole = (read_metrics(tmp_path / name)[0] for name in ("bf16", "fp32"))
    assert half["loss"] == pytest.approx(whole["loss"], abs=0.02)
    assert half["score_spread"] == pytest.approx(whole["score_spread"], rel=0.1)
    assert half["score_spread"] != whole["score_spread"]


def test_a_model_goes_to_a_device_that_is_there():
    model, _ = load_model("testbed", device="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="cannot put the model on device 'nowhere'"):
        load_model("testbed", device="nowhere")
