"""Calibrated retention: the test, the split, the rule that methods follow, and the command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vidsieve
from vidsieve import registry
from vidsieve.adapters import adapter_for
from vidsieve.adapters.fingerprint import model_digest, policy_digest, weights_digest
from vidsieve.cli import app
from vidsieve.compressors.calibrated import LADDER, calibrated, features
from vidsieve.errors import BudgetError, EvaluationError, RetentionError, StageError
from vidsieve.evaluation.calibration import FIT_SHARE, Measured, calibrate, fit, p_value, predicted, videos_needed
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import Results
from vidsieve.evaluation.items import Item
from vidsieve.evaluation.tasks.calibrating import CalibrationTask
from vidsieve.loading import load_model, shipped_policy
from vidsieve.policies import save_rule
from vidsieve.retention import FEATURES, Calibration, FrameRule, Rule
from vidsieve.types import TokenGrid, Tokens, VideoTokens


def rule(method="vidcom2", variant="ours", **fields):
    known = {
        "ladder": LADDER,
        "means": (0.0,) * 6,
        "scales": (1.0,) * 6,
        "weights": (-1.0, 0.3, 0.2, 0.0, 0.1, 0.0),
        "bias": -2.0,
        "threshold": 0.6,
        "fixed": 0.4,
        "tolerance": 0.02,
        "confidence": 0.9,
        "videos": 300,
        "questions": 900,
        "retention": 0.2,
        "loss": 0.004,
        "frames": (6, 8),
        "model_digest": "",
        "policy_digest": "",
    }
    return Rule(method=method, variant=variant, **(known | fields))


def clip(seed, frames=6, side=5, width=16):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(frames * side * side, width, generator=generator)
    return VideoTokens(embeds, TokenGrid(frames, side, side), torch.arange(len(embeds))[None])


# -- the test ---------------------------------------------------------------------------------------------------------


def test_the_p_value_is_the_largest_capital_of_the_bets():
    losses = np.random.default_rng(0).choice([1.0, 0.0, -1.0, 0.25], size=150, p=[0.01, 0.9, 0.08, 0.01])
    mean, capital, best = (0.05 + 1) / 2, 1.0, 1.0
    seen, squares = [0.5], [0.01]
    for loss in losses:
        x = (loss + 1) / 2
        guess, variance = sum(seen) / len(seen), sum(squares) / len(squares)
        bet = (mean - guess) / (variance + (mean - guess) ** 2)
        bet = min(max(bet, 0.0), 0.75 / (1 - mean))
        capital *= 1 + bet * (mean - x)
        best = max(best, capital)
        seen.append(x)
        squares.append((x - guess) ** 2)
    assert p_value(losses, 0.05) == pytest.approx(1 / best)
    assert best > 2


@pytest.mark.parametrize("each", [1, 5])
def test_a_rule_that_loses_the_tolerance_is_seldom_accepted(each):
    draw = np.random.default_rng(1)
    losses = draw.choice([1.0, 0.0, -1.0], size=(400, 500, each), p=[0.05, 0.92, 0.03]).mean(2)
    accepted = sum(p_value(row, 0.02) <= 0.1 for row in losses)
    assert accepted <= 40 + 3 * math.sqrt(400 * 0.1 * 0.9)


def test_a_rule_that_loses_nothing_is_accepted_from_the_stated_number_of_videos_on():
    for tolerance, confidence in ((0.01, 0.9), (0.05, 0.9), (0.02, 0.99)):
        count = videos_needed(tolerance, confidence)
        assert p_value(np.zeros(count), tolerance) <= 1 - confidence + 1e-12
        assert p_value(np.zeros(count - 1), tolerance) > 1 - confidence


# -- calibrating ------------------------------------------------------------------------------------------------------


def answers(videos, seed, each=4):
    """Answers that fail below a retention which the third feature tells; half of the videos are easy."""
    draw = np.random.default_rng(seed)
    need = np.repeat(draw.choice([0.03, 0.3], size=videos), each)
    ladder = np.array(LADDER)
    wrong = (ladder[None] < need[:, None]) & (draw.random((len(need), 1)) < 0.5)
    values = draw.normal(size=(len(need), len(LADDER), len(FEATURES))) * 0.1
    values[..., 0] = np.log(ladder)
    values[..., 2] += np.log(need)[:, None] - np.log(ladder)
    kept = np.broadcast_to(ladder, wrong.shape)
    return Measured(LADDER, values, wrong.astype(float), kept, np.repeat(np.arange(videos), each))


def test_a_calibrated_rule_keeps_its_bound_on_fresh_videos_with_fewer_tokens_than_a_fixed_retention():
    made = calibrate(answers(800, 0), "m", "ours", tolerance=0.02, confidence=0.9)
    fresh = answers(2000, 1)
    model = np.array(made.means), np.array(made.scales), np.array([made.bias, *made.weights])
    harm = predicted(model, fresh.features)
    steps = [next((i for i, h in enumerate(row) if h <= made.threshold), len(LADDER)) for row in harm]
    loss = np.mean([row[step] if step < len(LADDER) else 0.0 for row, step in zip(fresh.losses, steps, strict=True)])
    kept = np.mean([[*LADDER, 1.0][step] for step in steps])
    assert loss <= 0.02
    assert made.fixed == 0.3
    assert kept < 0.7 * made.fixed
    assert made.retention == pytest.approx(kept, abs=0.02)
    assert made.videos == 800 - round(FIT_SHARE * 800) and made.questions == 4 * made.videos


def test_a_fixed_retention_is_the_least_whose_bound_holds_in_a_row_of_tests():
    measured = answers(800, 2)
    made = calibrate(measured, "m", "ours", tolerance=0.02, confidence=0.9)
    step = LADDER.index(made.fixed)
    assert measured.by_video(measured.losses[:, step]).mean() <= 0.02
    assert measured.by_video(measured.losses[:, step - 1]).mean() > 0.02


def test_where_no_retention_is_harmless_enough_everything_is_kept():
    measured = answers(600, 3)
    worst = Measured(LADDER, measured.features, np.ones_like(measured.losses), measured.kept, measured.videos)
    made = calibrate(worst, "m", "ours", tolerance=0.01, confidence=0.9)
    assert made.fixed == 1.0 and made.retention > 0.99 and made.loss < 0.01


def test_too_few_videos_are_refused_with_the_number_needed():
    with pytest.raises(EvaluationError, match=r"100 videos are too few .* about (\d+) videos at least") as error:
        calibrate(answers(100, 0), "m", "ours", tolerance=0.01, confidence=0.9)
    needed = int(str(error.value).split("about ")[1].split()[0])
    assert calibrate(answers(needed + 1, 0), "m", "ours", tolerance=0.01, confidence=0.9)


def test_the_model_of_harm_is_a_logistic_regression():
    measured = answers(300, 4)
    means, scales, weights = fit(measured)
    x = torch.tensor((measured.features.reshape(-1, len(FEATURES)) - means) / scales)
    harm = torch.tensor((measured.losses.reshape(-1) > 0).astype(float))
    found = torch.tensor(weights).requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(found[0] + x @ found[1:], harm, reduction="sum")
    (loss + found[1:].square().sum() / 2 + 0.5e-3 * found[0] ** 2).backward()
    assert found.grad.abs().max() < 1e-5 * len(harm)


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vidcom2", "divprune"])
@pytest.mark.parametrize("seed", range(4))
def test_a_calibrated_method_keeps_the_first_step_that_the_rule_accepts(seed, name):
    video, method = clip(seed), vidsieve.load(name)
    got = calibrated(method, rule(name)).compress(video)
    for retention in [*LADDER, 1.0]:
        wanted = method.with_retention(retention).compress(video)
        if retention == 1.0:
            break
        scores = wanted.scores.double()
        z = (scores - scores.mean()) / scores.std(correction=0)
        kept = scores.topk(wanted.num_kept).indices
        low, high = z[kept].min(), z[kept].max()

        def dropped(values, kept=kept):
            return math.log(max(1e-6, 1 - float(values.softmax(0)[kept].sum())))

        read = (
            math.log(wanted.num_kept / video.num_tokens),
            dropped(scores),
            dropped(z),
            float(scores[kept].min()),
            float(low),
            float(high - low),
        )
        assert features(wanted.scores, wanted.num_kept, video.num_tokens) == pytest.approx(read, abs=1e-5)
        if 1 / (1 + math.exp(2 + read[0] - 0.3 * read[1] - 0.2 * read[2] - 0.1 * read[4])) <= 0.6:
            break
    assert torch.equal(got.indices, wanted.indices)


def test_what_acts_before_the_encoder_stays_before_a_calibrated_method():
    method = calibrated(vidsieve.load("reuse+vidcom2", tolerance=0.1), rule("reuse+vidcom2"))
    assert method.front == vidsieve.Reuse(0.1) and method.title == "reuse+vidcom2"


def test_floor_and_cap_bound_what_is_kept():
    video, method = clip(0), vidsieve.load("vidcom2")
    least = calibrated(method, rule(threshold=1.0), floor=0.2).compress(video)
    assert least.num_kept == 30
    most = calibrated(method, rule(threshold=-1.0), cap=0.5).compress(video)
    assert most.num_kept == 75
    assert calibrated(method, rule(threshold=-1.0)).compress(video).num_kept == 150
    with pytest.raises(BudgetError, match="floor and cap"):
        calibrated(method, rule(), floor=0.5, cap=0.4)


def test_a_rule_of_another_method_is_refused():
    with pytest.raises(RetentionError, match="calibrated for vidcom2"):
        calibrated(vidsieve.load("evs"), rule())
    with pytest.raises(StageError, match="before the LLM"):
        calibrated(vidsieve.load("fastv"), rule("fastv"))
    with pytest.raises(RetentionError, match=r"calibrated for vidcom2 .* not for reuse\+vidcom2"):
        calibrated(vidsieve.load("reuse+vidcom2"), rule())
    with pytest.raises(BudgetError, match="gives no scores"):
        features(None, 3, 10)


def test_a_pipeline_does_not_take_a_calibrated_part():
    method = calibrated(vidsieve.load("vidcom2"), rule())
    for first, second in ((method, vidsieve.load("fastv")), (vidsieve.Reuse(), method)):
        with pytest.raises(BudgetError, match="covers vidcom2 alone"):
            vidsieve.Pipeline(first, second, 0.2)


def test_a_rule_of_another_model_or_policy_is_refused_before_anything_runs():
    model, _ = load_model("testbed")
    adapter, method = adapter_for(model), vidsieve.load("score", "testbed")
    mine = rule("score", method.variant, model_digest=model_digest(model), policy_digest=policy_digest(method))
    adapter.check(calibrated(method, mine))
    with pytest.raises(RetentionError, match="other weights of score"):
        adapter.check(calibrated(method, msgspec.structs.replace(mine, policy_digest="0")))
    with pytest.raises(RetentionError, match="another model"):
        adapter.check(calibrated(method, msgspec.structs.replace(mine, model_digest="0")))
    other, _ = load_model("testbed", positions="compact")
    with (
        pytest.raises(RetentionError, match=r"another model.*positions"),
        vidsieve.attach(other, calibrated(method, mine)),
    ):
        pass
    weight = model.lm_head.weight
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(RetentionError, match="another model"):
        adapter.check(calibrated(method, mine))
    with torch.no_grad():
        weight[0, 0] -= 1
    adapter.check(calibrated(method, mine))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(weight))
    with pytest.raises(RetentionError, match="another model"):
        adapter.check(calibrated(method, mine))


def test_weights_of_any_size_have_a_hash():
    """Above 2²⁴ elements the place of the last one, in float32, would be one behind it."""
    weight = torch.zeros(2**24 + 4, dtype=torch.bfloat16)
    before = weights_digest([("a", weight)])
    weight[-1] = 1
    assert weights_digest([("a", weight)]) != before


def test_a_video_of_other_frames_than_those_calibrated_on_is_warned_of():
    method = calibrated(vidsieve.load("vidcom2"), rule())
    method.compress(clip(0, frames=8))
    for frames in (5, 9):
        with pytest.warns(UserWarning, match=f"6 to 8 frames of the token grid, and this one has {frames}"):
            method.compress(clip(0, frames=frames))


def test_a_rule_is_saved_with_its_policy_and_read_from_a_file(tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(shipped_policy("score"), folder)
    with pytest.raises(RetentionError, match="no rule saved"):
        vidsieve.load(folder, retention="calibrated")
    before = vidsieve.load(folder)
    saved = rule("score", before.variant)
    save_rule(folder, saved)
    method = vidsieve.load(folder, retention="calibrated", floor=0.1)
    assert method.rule == saved and method.floor == 0.1 and method.adaptive_budget
    assert vidsieve.load(folder).with_retention(Calibration()).rule == saved
    assert method.with_retention(0.25).retention == 0.25

    file = tmp_path / "rule.json"
    file.write_bytes(msgspec.json.encode(rule()))
    assert vidsieve.load("vidcom2", retention=f"calibrated:{file}").rule == rule()
    file.write_text(file.read_text().replace('"threshold":0.6', '"threshold":"x"'))
    with pytest.raises(RetentionError, match="holds no calibrated rule"):
        vidsieve.load("vidcom2", retention=f"calibrated:{file}")
    with pytest.raises(RetentionError, match="no calibrated rule in"):
        vidsieve.load("vidcom2", retention="calibrated:nowhere.json")


def test_vllm_takes_the_fixed_retention_of_the_same_bound(tmp_path):
    from vidsieve.serving.vllm.shared import settings_of

    file = tmp_path / "rule.json"
    file.write_bytes(msgspec.json.encode(rule()))

    config = SimpleNamespace(vidsieve={"method": "vidcom2", "retention": f"calibrated:{file}"})
    assert settings_of(config).method.retention == 0.4


# -- frames for a number of tokens ------------------------------------------------------------------------------------


def frame_rule(method="vidcom2", variant="ours", **fields):
    known = {
        "frames": (16, 64, 256),
        "tokens": (100, 400, 1600),
        "accuracy": ((0.5, 0.6, None), (0.55, 0.8, 0.9), (0.3, 0.795, 0.95)),
        "tolerance": 0.01,
        "videos": 5,
        "questions": 20,
        "model_digest": "abc",
    }
    return FrameRule(method=method, variant=variant, **(known | fields))


def test_accuracies_are_interpolated_over_the_logarithm_of_the_tokens():
    made = frame_rule()
    assert made.accuracies(400) == {16: 0.6, 64: 0.8, 256: 0.795}
    assert made.accuracies(200) == pytest.approx({16: 0.55, 64: 0.675, 256: 0.5475})
    assert made.accuracies(800) == pytest.approx({64: 0.85, 256: 0.8725})  # 16 frames have no 800 tokens


def test_the_fewest_frames_within_the_tolerance_of_the_best_are_read():
    assert [frame_rule().frames_for(count) for count in (100, 200, 400, 800, 1600)] == [64, 64, 64, 256, 256]
    assert frame_rule(tolerance=0.06).frames_for(100) == 16
    assert frame_rule(tolerance=0.0).frames_for(1600) == 256
    for count in (99, 1601):
        with pytest.raises(RetentionError, match=f"measured for 100 to 1600 tokens, not for {count}"):
            frame_rule().frames_for(count)
    with pytest.raises(ValueError, match="no number of frames has 100 tokens"):
        frame_rule(accuracy=((None, 0.5, 0.5),) * 3)


def test_frames_are_planned_for_a_method_that_keeps_a_number_of_tokens(tmp_path):
    method = vidsieve.load("vidcom2", retention=Tokens(800))
    assert vidsieve.frames_for(method, frame_rule()) == 256
    with pytest.raises(RetentionError, match=r"keeps 0\.25: ask for Tokens"):
        vidsieve.frames_for(method.with_retention(0.25), frame_rule())
    with pytest.raises(RetentionError, match="calibrated for score"):
        vidsieve.frames_for(method, frame_rule("score"))
    with pytest.raises(RetentionError, match=r"is not trained: run `vidsieve calibrate --tokens`.*auto:FILE"):
        vidsieve.frames_for(method)
    assert vidsieve.frames_for(method, frame_rule(), "abc") == 256
    with pytest.raises(RetentionError, match=r"this is another model.*positions"):
        vidsieve.frames_for(method, frame_rule(), "other")
    path = tmp_path / "rule.json"
    path.write_bytes(msgspec.json.encode(frame_rule()))
    assert vidsieve.frames_for(method, path) == vidsieve.frames_for(method, str(path)) == 256
    with pytest.raises(RetentionError, match=r"rule\.json is a rule of frames, and one of retentions is needed"):
        vidsieve.load("vidcom2", retention=f"calibrated:{path}")
    path.write_bytes(msgspec.json.encode(rule("vidcom2")))
    with pytest.raises(RetentionError, match=r"rule\.json is a rule of retentions, and one of frames is needed"):
        vidsieve.frames_for(method, path)
    folder = tmp_path / "policy"
    shutil.copytree(shipped_policy("score"), folder)
    with pytest.raises(RetentionError, match="no rule saved"):
        vidsieve.frames_for(vidsieve.load(folder, retention=Tokens(400)))
    save_rule(folder, rule("score"))
    save_rule(folder, frame_rule("score"))
    loaded = vidsieve.load(folder, retention=Tokens(400))
    assert vidsieve.frames_for(loaded) == 64
    assert vidsieve.load(folder, retention="calibrated").rule == rule("score")


def test_a_question_that_one_step_could_not_be_asked_is_left_out():
    items = [Item(name, Path("v.mp4"), "what ?", ("a", "b"), "A") for name in ("1", "2")]
    task = CalibrationTask(registry.benchmarks.get("questions"), items, None, None, "testbed")
    conditions = [Condition(None, 8), *(Condition(vidsieve.load("vidcom2", retention=r), 8) for r in (0.2, 0.4))]
    made = {"score": 1.0, "kept": 1, "total": 4, "layers": 0.25, "features": [0.0, 1.0]}
    samples = [made | {"item": item.id, "condition": c.key} for item in items for c in conditions]
    results = Results(conditions, {"v.mp4": {"samples": samples[:-1], "refused": {}}})
    assert task.measured(results).losses.shape == (1, 2), "question 2 has no answer at 0.4"


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_rule_is_calibrated_and_used_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    made = run.invoke(app, ["testbed", "render", "videos", "--scenes", "9", "--seed", "77"])
    assert made.exit_code == 0, made.output
    questions = next(path for path in tmp_path.joinpath("videos").glob("*.jsonl") if "question" in path.read_text())
    rows = {}
    for line in questions.read_text().splitlines():
        rows.setdefault(json.loads(line)["video"], []).append(line)
    questions.write_text("\n".join(line for some in rows.values() for line in some[:2]) + "\n")
    command = ["calibrate", "vidcom2", str(questions), "--tolerate", "0.5", "--confidence", "0.6", "--frames", "8"]
    command += ["--model", "testbed"]
    done = run.invoke(app, [*command, "--answer", "choice", "--json", "out.json"])
    assert done.exit_code == 0, done.output
    assert "--retention calibrated:vidcom2-rule.json" in " ".join(done.output.split())
    written = json.loads(tmp_path.joinpath("vidcom2-rule.json").read_text())
    assert written == json.loads(tmp_path.joinpath("out.json").read_text())["rule"]
    few = run.invoke(app, [*command[:4], "0.01", *command[5:], "--answer", "choice", "--out", "unasked"])
    assert not Path("unasked").exists(), "too few videos are refused before any question is asked"
    assert few.exit_code != 0 and "videos are too few" in " ".join(str(few.exception or few.output).split())
    for method, said in (("uniform", "gives no scores"), ("fastv", "before the LLM")):
        refused = run.invoke(app, ["calibrate", method, *command[2:], "--answer", "choice", "--out", method])
        assert refused.exit_code != 0 and said in " ".join(str(refused.exception or refused.output).split())
        journal = Path(method, "units-1-of-1.jsonl")
        assert not journal.exists() or not journal.read_text(), "refused at the first video"
    video = next(tmp_path.joinpath("videos").glob("*.mp4"))
    asked = ["ask", str(video), "what happens ?", "--method", "vidcom2", "--retention", "calibrated:vidcom2-rule.json"]
    answered = run.invoke(app, [*asked, "--frames", "8"])
    assert answered.exit_code == 0, answered.output
    refused = run.invoke(app, [*asked, "--frames", "8", "--model", "testbed:shallow"])
    assert refused.exit_code != 0 and "another model" in str(refused.exception or refused.output)


def test_frames_are_calibrated_and_read_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    made = run.invoke(app, ["testbed", "render", "videos", "--scenes", "2", "--frames", "24"])
    assert made.exit_code == 0, made.output
    questions = tmp_path / "videos" / "questions.jsonl"
    rows = {}
    for line in questions.read_text().splitlines():
        rows.setdefault(json.loads(line)["video"], []).append(line)
    questions.write_text("\n".join(line for some in rows.values() for line in some[:2]) + "\n")
    shared = ["--answer", "choice", "--positions", "compact", "--model", "testbed"]
    command = ["calibrate", "vidcom2", str(questions), "--frames", "24,6", "--tokens", "300,60", *shared]
    done = run.invoke(app, [*command, "--json", "out.json"])
    assert done.exit_code == 0, done.output
    assert "--tokens 300 --frames auto:vidcom2-frames.json" in " ".join(done.output.split())
    written = json.loads(tmp_path.joinpath("vidcom2-frames.json").read_text())
    assert (written["frames"], written["tokens"], written["questions"]) == ([6, 24], [60, 300], 4)
    table = {
        (row["frames"], row["retention"]): row["accuracy"] for row in json.loads(Path("out.json").read_text())["rows"]
    }
    assert written["accuracy"] == [[table[6, "60t"], None], [table[24, "60t"], table[24, "300t"]]]

    written["accuracy"] = [[1.0, None], [0.5, 1.0]]
    Path("rule.json").write_text(json.dumps(written))
    video = str(next(tmp_path.joinpath("videos").glob("*.mp4")))
    for tokens, frames in ((60, 6), (299, 24)):
        asked = ["ask", video, "where is the old sign ?", "--method", "vidcom2", "--tokens", str(tokens)]
        answered = run.invoke(
            app,
            [*asked, "--frames", "auto:rule.json", "--positions", "compact", "--model", "testbed", "--json", "a.json"],
        )
        assert answered.exit_code == 0, answered.output
        given = json.loads(Path("a.json").read_text())
        assert (given["frames"], given["videos"][0]["kept"]) == (frames, tokens)
        assert f"frames: {frames}, by the rule of vidcom2" in answered.output
    Path("rows.jsonl").write_text(json.dumps({"video": video, "question": "where is the old sign ?"}) + "\n")
    batch = ["batch", "rows.jsonl", "answers.jsonl", "--method", "vidcom2", "--frames", "auto:rule.json"]
    done = run.invoke(app, [*batch, "--retention", "60t", "--model", "testbed"])
    assert done.exit_code == 0, done.output
    answered = json.loads(Path("answers.jsonl").read_text())
    assert (answered["frames"], answered["kept"]) == (6, 60)
    refused = run.invoke(app, [*batch, "--retention", "0.5", "--model", "testbed"])
    assert refused.exit_code != 0 and "ask for Tokens(512)" in str(refused.exception or refused.output)

    refused = run.invoke(app, [*asked, "--retention", "0.5"])
    assert refused.exit_code != 0 and "two budgets" in str(refused.exception or refused.output)

    measured = ["eval", "questions", str(questions), "--model", "testbed", "--methods", "vidcom2", "--tokens", "60"]
    done = run.invoke(app, [*measured, "--frames", "8,auto:rule.json", *shared, "--out", "run", "--json", "eval.json"])
    assert done.exit_code == 0, done.output
    rows = [(row["method"], row["frames"]) for row in json.loads(Path("eval.json").read_text())["rows"]]
    assert ("vidcom2", 6) in rows and ("vidcom2", 8) in rows and ("random", 6) not in rows
