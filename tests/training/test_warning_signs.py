"""Early warnings come from figures alone, once, and say what to do."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import rankdata, spearmanr

from vidsieve.policies import read_config
from vidsieve.training.heldout import rank_correlation, ranks
from vidsieve.training.losses import keep_entropy
from vidsieve.training.recipes import train_policy
from vidsieve.training.score import ScoreTrainer
from vidsieve.training.trainer import Events, StepResult
from vidsieve.training.warning_signs import warnings

HEALTHY = {
    "kept": 0.1,
    "score_spread": 0.5,
    "entropy": 0.5,
    "blind": 0.1,
    "dead_groups": 0.1,
    "map_stability": 0.9,
}


def lines(count=3, first=41, **changed):
    return [HEALTHY | changed | {"step": first + number} for number in range(count)]


def test_a_healthy_run_is_left_alone():
    assert warnings(lines(10), 100, own_rate=True) == {}
    assert warnings([], 100, own_rate=True) == {}
    assert warnings([{"step": 1, "loss": 0.5}] * 5, 100, own_rate=True) == {}


@pytest.mark.parametrize(
    ("figure", "value", "name", "advice"),
    [
        ("kept", 0.99, "keep-all", "lower tolerance"),
        ("kept", 0.001, "drop-all", "raise tolerance"),
        ("score_spread", 0.001, "flat scores", "score_decay"),
        ("entropy", 0.01, "saturated scores", "learning rate"),
        ("blind", 0.6, "blind answers", "data filter"),
        ("dead_groups", 0.6, "dead groups", "reward margin"),
        ("map_stability", 0.2, "unstable maps", "more prompts"),
    ],
)
def test_each_sign_warns_by_its_name_after_three_lines(figure, value, name, advice):
    found = warnings(lines(3, **{figure: value}), 100, own_rate=True)
    assert list(found) == [name] and advice in found[name]
    assert warnings(lines(2, **{figure: value}), 100, own_rate=True) == {}, "two lines are too few"
    recovered = lines(3, **{figure: value}) + lines(1, first=44)
    assert warnings(recovered, 100, own_rate=True) == {}, "the last line is healthy again"


def test_a_given_rate_is_no_sign_and_maps_may_change_at_first():
    assert warnings(lines(3, kept=0.001), 100, own_rate=False) == {}
    assert warnings(lines(3, first=10, map_stability=0.1), 100, own_rate=False) == {}
    assert "unstable maps" in warnings(lines(3, first=30, map_stability=0.1), 100, own_rate=False)


def test_figures_that_are_in_some_lines_only_count_where_they_are():
    some = [line for pair in zip(lines(3, map_stability=0.1), [{"step": 50}] * 3, strict=True) for line in pair]
    assert "unstable maps" in warnings(some, 100, own_rate=False)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys_ties_included(seed):
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, 6, (40,), generator=draw).float(), torch.randn(40, generator=draw)
    assert ranks(a).tolist() == rankdata(a.numpy()).tolist()
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)
    assert rank_correlation(b, b) == pytest.approx(1.0) and rank_correlation(b, -b) == pytest.approx(-1.0)


def test_rank_correlation_with_a_constant_is_zero():
    assert rank_correlation(torch.ones(5), torch.arange(5.0)) == 0.0


def test_entropy_is_in_bits():
    assert keep_entropy(torch.zeros(3)) == pytest.approx(1.0)
    p = torch.tensor(0.1)
    wanted = float(-(p * p.log2() + (1 - p) * (1 - p).log2()))
    assert keep_entropy(torch.logit(p)[None]) == pytest.approx(wanted, abs=1e-6)
    assert keep_entropy(torch.tensor([-800.0, 800.0])) == pytest.approx(0.0, abs=1e-9)


def test_a_run_warns_once_and_its_record_remembers_over_a_pause(testbed, tmp_path, monkeypatch):
    original = ScoreTrainer.train_step

    def dead(self, sample):
        result = original(self, sample)
        return StepResult(result.loss, result.metrics | {"dead_groups": 1.0})

    monkeypatch.setattr(ScoreTrainer, "train_step", dead)
    settings = {"prompts_per_step": 1, "log_every": 1, "save_every": 1, "eval_prompts": 0}
    said = []
    for steps in (4, 6):
        record = train_policy(
            "score", *testbed, tmp_path, settings | {"steps": steps}, events=Events(warn=said.append), resume=steps == 6
        )
    assert len(said) == 1 and said[0].startswith("dead groups: 100 % of the groups")
    assert record["warnings"]["dead groups"]["step"] == 3
    assert read_config(tmp_path / "policy").training["warnings"] == record["warnings"]
