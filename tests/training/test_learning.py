"""What both trainers can learn from besides the papers' objective: teachers, controls, remedies, a curriculum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import NeedError, TrainingError, UnknownNameError
from vidsieve.testbed.pseudo import HELD, make_pseudo
from vidsieve.testbed.world import FRAMES, TOKENS, make_cast, render
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.tiny_models import FAMILIES
from vidsieve.training import cacovid, losses
from vidsieve.training.advantages import leave_one_out, no_std, split_advantage
from vidsieve.training.controls import attention_rows, caption_loss, choice_loss, gated, teacher_scores
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.recipes import new_cacovid, train_policy
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.run_folder import read_metrics
from vidsieve.training.sampling import log_uniform
from vidsieve.training.settings import CaCoVIDConfig, ScoreConfig, config_of
from vidsieve.training.sources import Files


@pytest.fixture
def prompts(testbed):
    model, processor = testbed
    return ScenePrompts(adapter_for(model), processor, seed=3)


@pytest.fixture
def cpo_calls(monkeypatch):
    """Logits, old log-probabilities, masks and options of every loss of CaCoVID."""
    calls, original = [], cacovid.cpo_loss

    def noted(logits, old, masks, advantages, **options):
        calls.append((logits.detach(), old, masks, options))
        return original(logits, old, masks, advantages, **options)

    monkeypatch.setattr(cacovid, "cpo_loss", noted)
    return calls


def run(testbed, folder, method, variant="ours", **settings):
    model, processor = testbed
    few = {"rollouts": 4} if method == "score" and settings.get("objective") != "distil" else {}
    settings = {"steps": 2, "prompts_per_step": 2, "log_every": 1, "seed": 5, "eval_prompts": 0} | few | settings
    record = train_policy(method, model, processor, folder, settings, variant=variant, model_name="testbed")
    return record, read_metrics(folder)


# -- pure functions -----------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_keep_probabilities():
    logits = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    p = logits.sigmoid()
    wanted = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert float(losses.entropy(logits)) == pytest.approx(float(wanted), abs=1e-6)
    assert float(losses.entropy(torch.zeros(3))) == pytest.approx(math.log(2))
    assert float(losses.entropy(torch.tensor([80.0, -80.0]))) == pytest.approx(0, abs=1e-6)
    assert float(losses.entropy_shortfall(torch.zeros(3), 0.6)) == 0
    assert float(losses.entropy_shortfall(logits, 0.6)) == pytest.approx(0.6 - float(wanted), abs=1e-6)


def test_the_floor_pulls_entropy_up_and_the_band_the_keep_rate_in():
    for function, better in (
        (lambda x: losses.entropy_shortfall(x, 0.69), lambda x: float(losses.entropy(x))),
        (lambda x: losses.band_distance(x, 0.2, 0.3), lambda x: -float(losses.band_distance(x, 0.2, 0.3))),
    ):
        logits = torch.tensor([3.0, 2.0, 1.0]).requires_grad_()
        function(logits).backward()
        moved = logits.detach() - 0.1 * logits.grad
        assert better(moved) > better(logits.detach())
    inside = torch.logit(torch.tensor([0.25, 0.25]))
    assert float(losses.band_distance(inside, 0.2, 0.3)) == 0
    assert float(losses.band_distance(inside, 0.3, 0.4)) == pytest.approx(0.05)


def test_distillation_is_least_at_the_teachers_own_scores():
    teacher = torch.randn(20, generator=torch.Generator().manual_seed(0))
    scores = teacher.clone().requires_grad_()
    loss = losses.distillation_loss(scores, teacher)
    p = teacher.softmax(0)
    assert float(loss.detach()) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    loss.backward()
    assert float(scores.grad.abs().max()) < 1e-6
    assert float(losses.distillation_loss(teacher + 3, teacher)) == pytest.approx(float(loss.detach()), abs=1e-5)


def test_advantages_without_std_and_with_few_safe_rollouts():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert no_std(rewards).tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert torch.allclose(leave_one_out(rewards), no_std(rewards) * 4 / 3)
    delta, sparsity = torch.tensor([0.5, -0.2, -0.1]), torch.tensor([0.4, 0.6, 0.0])
    assert split_advantage(delta, sparsity).tolist() == pytest.approx([0, -0.12, 0]), "Eq. 7: a lone safe one teaches 0"
    assert split_advantage(delta, sparsity, least_safe=2).tolist() == pytest.approx([0.2, -0.12, 0])
    two = torch.tensor([0.5, 0.2, -0.1])
    assert torch.equal(split_advantage(two, sparsity, least_safe=2), split_advantage(two, sparsity))


def test_rates_are_log_uniform():
    draw = torch.Generator().manual_seed(0)
    rates = [log_uniform(0.01, 0.25, draw) for _ in range(4000)]
    assert min(rates) >= 0.01 and max(rates) <= 0.25
    assert sum(rate < 0.05 for rate in rates) / 4000 == pytest.approx(0.5, abs=0.03)


# -- teachers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_rows_are_those_of_the_eager_model(family):
    """Recomputed from the projections of every layer, against what transformers returns."""
    model = FAMILIES[family]()
    adapter = adapter_for(model)
    rollouts = Rollouts(adapter, configuration(family, "batch 1"))
    encoded = rollouts.encoded
    rows = encoded.attention_mask[0].nonzero().flatten()[[-3, -1]]
    layers = range(len(adapter.decoder_layers))
    found, ran = attention_rows(rollouts, rows, layers), []
    hooks = [
        layer.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(adapter.decoder_layers)
    ]
    (first,) = attention_rows(rollouts, rows, [1])
    assert torch.equal(first, found[1]) and ran == [0], "layers from the last to read on need not run"
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("eager")
    whole = adapter.build(encoded, encoded.per_row(encoded.everything()))
    with torch.no_grad():
        wanted = model(**whole.inputs, use_cache=False, output_attentions=True).attentions
    place = {int(column): i for i, column in enumerate(whole.kept_positions[0])}
    asked = [place[int(row)] for row in rows]
    tokens = [place[int(column)] for column in encoded.videos[0].columns]
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs[0][:, asked][..., tokens], atol=1e-5)


def test_the_first_look_finds_what_is_asked_and_mean_attention_does_not(prompts):
    """World dense's weakness, and CaCoVID's Figure 1: the question's targets by rank under both teachers."""
    ranks = {"first_look": [], "attention": []}
    for number in range(12):
        index = number % 32
        sample = prompts.choice(number)
        _, questions, _ = prompts._scene(index)
        target = questions[0].targets[0]
        rollouts = Rollouts(prompts.adapter, sample.inputs)
        for teacher, found in ranks.items():
            scores = teacher_scores(rollouts, teacher)
            assert scores.shape == (TOKENS,) and bool(torch.isfinite(scores).all())
            found.append(int((scores > scores[target]).sum()))
    assert sorted(ranks["first_look"])[6] < 20
    assert sorted(ranks["attention"])[6] > 60


def test_the_oracle_names_what_is_asked_about_and_needs_to_be_told(prompts):
    sample = prompts.choice(3)
    rollouts = Rollouts(prompts.adapter, sample.inputs)
    scores = teacher_scores(rollouts, "oracle", sample.targets)
    assert set(torch.topk(scores, len(sample.targets)).indices.tolist()) == set(prompts.asked(3)[1].targets)
    assert float(scores.softmax(0)[sample.targets].sum()) > 0.99
    with pytest.raises(NeedError, match="must be told which tokens"):
        teacher_scores(rollouts, "oracle")


def test_captions_are_looked_at_from_their_own_words(prompts):
    rollouts = Rollouts(prompts.adapter, prompts.caption(1).inputs)
    scores = {teacher: teacher_scores(rollouts, teacher) for teacher in ("first_look", "attention")}
    cast = make_cast("dense", 3, 1)
    named = {t for o in cast.objects if o.kind == "fixture" or o.shape in cast.unique_shapes for t in o.tokens()}
    inside = torch.zeros(TOKENS, dtype=torch.bool)
    inside[list(named)] = True
    for found in scores.values():
        assert float(found[inside].mean()) > float(found[~inside].mean())


# -- controls -----------------------------------------------------------------------------------------------


def test_straight_through_changes_nothing_forward_and_is_the_gradient_of_scaling_a_token(prompts):
    """At a kept token: p(1 − p) times d loss / d gate, by finite differences; at a dropped one 0."""
    sample = prompts.choice(0)
    rollouts = Rollouts(prompts.adapter, sample.inputs)
    video = rollouts.video()
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(3, TOKENS, generator=draw) < 0.05
    logits = torch.randn(TOKENS, generator=draw).requires_grad_()
    selections = gated(video, logits, masks)
    loss, right = choice_loss(rollouts, sample.option_ids, sample.answer, selections)
    wanted = rollouts.option_logits(masks, sample.option_ids)
    target = torch.full((3,), sample.answer)
    assert float(loss.detach()) == pytest.approx(float(torch.nn.functional.cross_entropy(wanted, target)), abs=1e-5)
    assert right.tolist() == (wanted.argmax(1) == sample.answer).float().tolist()
    loss.backward()
    assert bool((logits.grad[~masks.any(0)] == 0).all())
    token = int(logits.grad.abs().argmax())
    moved = []
    for gate in (0.99, 1.01):
        scaled = [
            type(s)(s.indices, embeds=torch.where((s.indices == token)[:, None], s.embeds * gate, s.embeds).detach())
            for s in selections
        ]
        moved.append(float(choice_loss(rollouts, sample.option_ids, sample.answer, scaled)[0].detach()))
    p = float(logits[token].detach().sigmoid())
    assert float(logits.grad[token]) == pytest.approx(p * (1 - p) * (moved[1] - moved[0]) / 0.02, rel=0.05)


def test_the_caption_control_scores_as_rollouts_do(prompts):
    rollouts = Rollouts(prompts.adapter, prompts.caption(0).inputs)
    masks = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.2
    logits = torch.zeros(TOKENS, requires_grad=True)
    loss = caption_loss(rollouts, gated(rollouts.video(), logits, masks))
    assert torch.allclose(loss.detach(), rollouts.caption_ce(masks), atol=1e-5)
    loss.mean().backward()
    assert float(logits.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("cacovid", {"objective": "distil"}),
        ("cacovid", {"objective": "distil", "teacher": "attention"}),
        ("cacovid", {"objective": "distil", "teacher": "oracle"}),
        ("cacovid", {"objective": "straight_through"}),
        ("score", {"objective": "distil"}),
        ("score", {"objective": "straight_through"}),
    ],
)
def test_controls_learn_without_rewards(testbed, tmp_path, method, settings):
    _, lines = run(testbed, tmp_path, method, steps=6, **settings)
    assert "reward" not in lines[0] and "safe" not in lines[0]
    if settings == {"objective": "distil"}:
        assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_warm_up_distils_first_and_then_rolls_out(testbed, tmp_path, monkeypatch):
    """The frozen LLM answers nothing before there are rewards, and the first rewarded prompts without the video."""
    answered, original = [], Rollouts.option_logits
    monkeypatch.setattr(Rollouts, "option_logits", lambda *args: answered.append(args) or original(*args))
    _, lines = run(testbed, tmp_path, "cacovid", steps=3, warmup_steps=2, reward="agreement")
    assert [("reward" in line, "blind" in line) for line in lines] == [(False, False), (False, False), (True, True)]
    assert [line["rollouts_per_second"] > 0 for line in lines] == [False, False, True]
    assert len(answered) == 4, "two prompts: under all tokens, and under their rollouts"


@pytest.mark.parametrize("method", ["cacovid", "score", "sieve"])
def test_a_warm_up_s_loss_is_a_mean_over_tokens_as_that_of_rewards(testbed, tmp_path, method):
    few = {"steps": 1, "prompts_per_step": 1}
    _, (whole,) = run(testbed, tmp_path / "distil", method, objective="distil", **few)
    _, (first, _) = run(testbed, tmp_path / "warm_up", method, warmup_steps=1, **few | {"steps": 2})
    assert first["loss"] == pytest.approx(whole["loss"] / 576, rel=0.01)


def test_controls_are_rewarded_as_the_policy_gradient_is(testbed, tmp_path, prompts):
    """Under reward "agreement" straight-through reads no label either."""
    config = config_of("cacovid", "ours", {"objective": "straight_through", "reward": "agreement"})
    policy = new_cacovid(prompts.adapter, config, "ours", "testbed")
    trainer, found = cacovid.CaCoVIDTrainer(prompts.adapter, policy, config, prompts.choice, tmp_path), []
    for label in (0, 1):
        trainer.generator.manual_seed(0)
        prompt = trainer.prepare(replace(prompts.choice(2), answer=label))
        found.append(float(trainer.train_step(prompt).loss.detach()))
    assert found[0] == found[1]


def test_an_answer_that_is_not_finite_is_no_reward(testbed, tmp_path, prompts, monkeypatch):
    config = config_of("cacovid", "ours", {"reward": "agreement"})
    policy = new_cacovid(prompts.adapter, config, "ours", "testbed")
    trainer = cacovid.CaCoVIDTrainer(prompts.adapter, policy, config, prompts.choice, tmp_path)
    monkeypatch.setattr(Rollouts, "option_logits", lambda *_: torch.tensor([[0.0, torch.nan, 0.0, 0.0]]))
    result = trainer.train_step(trainer.prepare(prompts.choice(2)))
    assert result.loss is None and result.broken.startswith("reward 'agreement' is nan")


# -- remedies, the release's trainer, the curriculum ----------------------------------------------------------


def test_rates_of_deployment_are_drawn_for_every_prompt(testbed, tmp_path):
    _, lines = run(testbed, tmp_path, "cacovid", steps=5, prompts_per_step=1, rate_low=0.05, rate_high=0.2)
    ratios = [line["ratio"] for line in lines]
    assert len(set(ratios)) == 5 and all(0.05 <= ratio <= 0.2 for ratio in ratios)


def test_entropy_floor_and_band_reach_the_loss(testbed, tmp_path):
    plain, _ = run(testbed, tmp_path / "a", "score", steps=1)
    floor, _ = run(testbed, tmp_path / "b", "score", steps=1, entropy_floor=0.69)
    own = {"rate_low": 0.0, "rate_high": 0.0}
    free, _ = run(testbed, tmp_path / "d", "score", steps=1, **own)
    band, _ = run(testbed, tmp_path / "c", "score", steps=1, kept_low=0.7, kept_high=0.8, **own)
    assert floor["last_metrics"]["loss"] != plain["last_metrics"]["loss"]
    assert band["last_metrics"]["loss"] - free["last_metrics"]["loss"] == pytest.approx(0.2, abs=0.03)


def test_the_release_draws_all_iterations_from_the_first_policy(shallow, tmp_path, cpo_calls):
    record, _ = run(shallow, tmp_path, "cacovid", "official", steps=1, prompts_per_step=1, iterations=2, head_lr=0.01)
    (first, _, masks, options), frames, (second, old, both, _) = cpo_calls[:3]
    assert (len(masks), len(frames[2]), len(both)) == (23, 8, 46)
    assert options["balanced"] and not frames[3]["balanced"]
    assert not torch.equal(first, second)
    assert torch.allclose(old, losses.action_log_probs(first, both)), "old log-probabilities of iteration 1"
    order = (first[:, 1] - first[:, 0]).reshape(FRAMES, -1).argmax(1)
    greedy = both[23].reshape(FRAMES, -1).nonzero()[:, 1]
    assert torch.equal(greedy, order), "the second iteration is drawn, and its greedy mask taken, from the first scores"
    assert record["settings"]["causal"]


def test_the_release_is_blind_and_the_paper_is_not(testbed, prompts):
    """Another question changes the scores of a bidirectional body, not of a causal one (part 1, §1.2)."""
    from vidsieve.compressors.cacovid import CaCoVIDPolicy
    from vidsieve.types import Need

    adapter = prompts.adapter
    state = adapter.layer_state(0)
    one, other = (Rollouts(adapter, prompts.choice(n).inputs).video(frozenset({Need.QUESTION})) for n in (0, 32))
    assert torch.equal(one.embeds, other.embeds), "two questions about one scene"
    for causal in (False, True):
        policy = CaCoVIDPolicy.of_shape(
            state.shape, adapter.family, variant="paper", layers=[state.weights], causal=causal
        )
        with torch.no_grad():
            same = torch.equal(policy(one)[0], policy(other)[0])
        assert same == causal


def test_a_pseudo_video_holds_still_images(testbed):
    for index in range(20):
        cast, frames = make_pseudo("dense", 3, index)
        again = make_pseudo("dense", 3, index)[1]
        assert frames.shape[0] == FRAMES and (frames == again).all()
        changed = [t for t in range(1, FRAMES) if (frames[t] != frames[t - 1]).any()]
        lengths = [b - a for a, b in zip([0, *changed], [*changed, FRAMES], strict=True)]
        assert 3 <= len(lengths) <= 4 and all(HELD[0] <= length <= HELD[1] for length in lengths)
        scene = render(make_cast("dense", 3, index), 3, index)
        assert all(any((frame == other).all() for other in scene) for frame in frames)
        starts = {o.track[0][0] for o in cast.objects}
        assert starts <= {0, *changed}, "nothing appears while an image is held"


def test_the_curriculum_begins_with_pseudo_videos_and_their_own_tolerance(testbed, tmp_path, monkeypatch, prompts):
    from vidsieve.training import score as rl_score

    seen = []
    original = rl_score.score_rewards

    def noted(ce, ce_full, masks, tolerance):
        seen.append((ce_full, tolerance))
        return original(ce, ce_full, masks, tolerance)

    monkeypatch.setattr(rl_score, "score_rewards", noted)
    run(testbed, tmp_path, "score", "paper", steps=3, prompts_per_step=1, pseudo_steps=2, lr=0.0, seed=3)
    source = ScenePrompts(prompts.adapter, prompts.processor, "sparse", seed=100_003)
    everything = torch.ones(1, TOKENS, dtype=torch.bool)
    samples = [source.pseudo(0), source.pseudo(1), source.caption(0)]
    wanted = [float(Rollouts(prompts.adapter, s.inputs).caption_ce(everything)[0]) for s in samples]
    assert [tolerance for _, tolerance in seen] == [1.01, 1.01, 1.02]
    assert [full for full, _ in seen] == pytest.approx(wanted, abs=1e-5)


def test_filtered_questions_are_those_that_need_the_video(testbed):
    from vidsieve.training.data.filtering import blind_answers

    model, processor = testbed
    whole = ScenePrompts(adapter_for(model), processor, seed=3)
    left = ScenePrompts(adapter_for(model), processor, seed=3, blind_filter=True)
    before, after = whole._scene(0)[1], left._scene(0)[1]
    rows = [{"question": q.text, "options": list(q.options), "answer": q.answer} for q in before]
    known = blind_answers(model, processor, rows)
    assert 0 < len(after) < len(before)
    assert [q.text for q in after] == [q.text for q, right in zip(before, known, strict=True) if not right]


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (CaCoVIDConfig, {"rate_low": 0.1}, "rate_low and rate_high"),
        (
            CaCoVIDConfig,
            {"rate_low": 0.1, "rate_high": 0.2, "dynamic_ratio": True, "iterations": 2},
            "leave dynamic_ratio",
        ),
        (CaCoVIDConfig, {"sampler": "official", "over": "video"}, "every frame"),
        (CaCoVIDConfig, {"objective": "distil", "warmup_steps": 3}, "warmup_steps"),
        (CaCoVIDConfig, {"entropy_floor": 0.8}, "entropy_floor must be from 0 to 0.69"),
        (ScoreConfig, {"least_safe": 17}, "more than the 16 rollouts"),
        (ScoreConfig, {"kept_low": 0.5, "kept_high": 0.4}, "not below"),
        (CaCoVIDConfig, {"objective": "distil", "reward": "margin", "blind_margin": True}, "blind_margin is about"),
        (CaCoVIDConfig, {"objective": "straight_through", "reward": "generate"}, "needs options"),
        (CaCoVIDConfig, {"objective": "distil", "iterations": 2}, "set them to 1"),
        (CaCoVIDConfig, {"blind_margin": True, "reward": "choice"}, "changes reward 'margin', got 'choice'"),
        (ScoreConfig, {"advantage": "group", "least_safe": 2}, "belongs to 'split'"),
        (ScoreConfig, {"kept_low": 0.1, "rate_low": 0.1, "rate_high": 0.2}, "the policy's own rate"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make, settings, said):
    with pytest.raises(TrainingError, match=said):
        make(**settings)
    with pytest.raises(UnknownNameError, match="teacher"):
        make(teacher="atention")


@pytest.mark.parametrize(
    ("method", "variant", "settings", "said"),
    [
        ("cacovid", "ours", {"body_lr": 1e-3}, "body_lr is for decoder layers"),
        ("cacovid", "paper", {"match": "mean"}, "match is for body 'question'"),
        ("cacovid", "ours", {"ratio": 0.2, "rate_low": 0.1, "rate_high": 0.2}, "ratio is what rate_low"),
        ("cacovid", "ours", {"replay": False}, "replay acts between iterations"),
        ("cacovid", "ours", {"ratio_low": 0.2}, "ratio_low is a threshold of dynamic_ratio"),
        ("cacovid", "ours", {"width": 4.0, "sampler": "random"}, "width is the width of OCSS, not of sampler 'random'"),
        ("cacovid", "ours", {"objective": "distil", "advantage": "no_std"}, "advantage is about rewards"),
        ("cacovid", "ours", {"objective": "soft_topk", "sampler": "random"}, "sampler draws masks"),
        ("cacovid", "ours", {"answer_tokens": 4}, "answer_tokens is for reward 'generate'"),
        ("cacovid", "ours", {"teacher": "attention"}, "teacher is for objective 'distil' and for warmup_steps"),
        ("sieve", "ours", {"question_dropped": 0.3}, "question_dropped is 1 where the question's part is taught"),
        ("sieve", "ours", {"reward": "choice"}, "reward is about answers, and captions alone are rewarded"),
        ("sieve", "ours", {"objective": "distil", "taught": False}, "taught is for objective 'policy_gradient'"),
        (
            "sieve",
            "ours",
            {"taught": False, "question_dropped": 0.0, "blind_reward": "answer"},
            "blind_reward is for rollouts without the question, and there are none",
        ),
        ("score", "ours", {"tolerance": 1.1}, "tolerance belongs to advantage 'split'"),
        ("score", "paper", {"pseudo_tolerance": 1.1}, "pseudo_tolerance is for pseudo_steps"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(method, variant, settings, said):
    with pytest.raises(TrainingError, match=said):
        config_of(method, variant, settings)
    name = said.partition(" ")[0]
    usual = getattr(config_of(method, variant, {}), name)
    assert getattr(config_of(method, variant, settings | {name: usual}), name) == usual, "the default is no fault"


def test_what_a_recipe_refuses(testbed, tmp_path):
    with pytest.raises(TrainingError, match="causal is for bodies"):
        run(testbed, tmp_path / "a", "cacovid", causal=True)
    model, processor = testbed
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    for method, settings, files, said in (
        ("cacovid", {"blind_filter": True}, Files(path), "vidsieve data filter"),
        ("score", {"pseudo_steps": 1}, Files(path), "vidsieve data pseudo"),
        ("score", {}, Files(pseudo=path), "leave it out"),
        ("score", {}, Files(path, pseudo=path), "set pseudo_steps"),
    ):
        with pytest.raises(TrainingError, match=said):
            train_policy(method, model, processor, tmp_path / "b", settings, files=files)


@pytest.mark.parametrize("frames", [12, 15, 16, 20, 32])
@pytest.mark.parametrize(
    ("per_frame", "ratio"), [(16, 0.02), (25, 0.02), (36, 0.01), (36, 0.12), (196, 0.02), (196, 0.12)]
)
def test_the_release_draws_from_frames_of_every_size(frames, per_frame, ratio):
    from vidsieve.training import release_sampling as official
    from vidsieve.types import TokenGrid

    grid = TokenGrid(frames, 1, per_frame)
    draw = torch.Generator().manual_seed(0)
    tokens = max(1, round(ratio * per_frame))
    masks = official.token_masks(torch.randn(grid.num_tokens, generator=draw), grid, ratio, 5, draw)
    assert (masks.reshape(5, frames, per_frame).sum(2) == tokens).all()
    embeds = torch.randn(grid.num_tokens, 4, generator=draw)
    shown, kept = official.frame_masks(embeds, torch.randn(frames, generator=draw), grid, ratio, 5, draw)
    assert (kept.sum(1) == tokens * frames).all()
    wanted = max(math.ceil(frames / 8), math.ceil(tokens * frames / per_frame))
    assert (shown.sum(1) == wanted).all()
    assert not (kept.reshape(5, frames, per_frame).any(2) & ~shown).any()


def test_a_rate_is_drawn_once_a_prompt_and_shared_by_its_iterations(testbed, tmp_path, cpo_calls):
    settings = {"iterations": 3, "rate_low": 0.03, "rate_high": 0.25, "frame_rollouts": 0, "prompts_per_step": 1}
    run(testbed, tmp_path, "cacovid", steps=4, **settings)
    counts = [masks.sum(1) for _, _, masks, _ in cpo_calls]
    assert [len(each) for each in counts] == [24, 48, 72] * 4
    assert all(len(set(each.tolist())) == 1 for each in counts)
    assert len({int(each[0]) for each in counts}) > 1, "another prompt, another rate"


def test_without_replay_a_group_is_the_iterations_own(testbed, tmp_path, cpo_calls):
    run(testbed, tmp_path, "cacovid", steps=1, prompts_per_step=1, iterations=3, replay=False, frame_rollouts=0)
    assert [len(masks) for _, _, masks, _ in cpo_calls] == [24, 24, 24]


def test_the_entropy_floor_looks_at_what_is_drawn_from(testbed, tmp_path):
    """At a mean rate of 5 % no policy has .6 nats of entropy: the floor must bite from the first step on."""
    _, lines = run(testbed, tmp_path, "score", steps=1, rate_low=0.05, rate_high=0.05, entropy_floor=0.6)
    assert lines[0]["loss"] == pytest.approx(0.6 - lines[0]["entropy"] * math.log(2), abs=0.02)


def test_cacovids_entropy_floor_adds_what_is_missing_below_it(testbed, tmp_path):
    settings = {"steps": 1, "prompts_per_step": 1, "objective": "distil", "start": "first_look"}
    _, (plain,) = run(testbed, tmp_path / "a", "cacovid", **settings)
    _, (floor,) = run(testbed, tmp_path / "b", "cacovid", entropy_floor=0.69, **settings)
    missing = 0.69 - floor["entropy"] * math.log(2)
    assert missing > 0.001, "else this test sees nothing"
    assert floor["loss"] - plain["loss"] == pytest.approx(missing, rel=0.01)


@pytest.mark.parametrize("method", ["cacovid", "score"])
def test_a_prompt_taken_twice_in_a_step_teaches_what_it_teaches_once(testbed, tmp_path, monkeypatch, method):
    """The gradient of a step is the mean over its prompts: `grad_clip` means the same whatever their number."""
    for name in ("choice", "caption"):
        own = getattr(ScenePrompts, name)
        monkeypatch.setattr(ScenePrompts, name, lambda self, number, own=own: own(self, 0))
    once, twice = (
        run(testbed, tmp_path / str(n), method, steps=1, prompts_per_step=n, objective="distil")[1][0] for n in (1, 2)
    )
    assert once["gradient_norm"] > 0.001 and twice["gradient_norm"] == pytest.approx(once["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("start", ["nothing", "first_look"])
def test_what_a_policy_starts_from(testbed, tmp_path, prompts, start):
    """The first layer that sees the video is the third of the deep model; without it, the policy starts blank."""
    from vidsieve import load

    run(testbed, tmp_path, "cacovid", steps=1, start=start, head_lr=0.0)
    scorer = load(tmp_path / "policy").policy.scorer
    if start == "nothing":
        assert scorer.first_look is None
        return
    adapter = prompts.adapter
    assert adapter.first_full_layer == 2
    assert torch.equal(
        scorer.first_look.self_attn.q_proj.weight, adapter.layer_state(2).weights["self_attn.q_proj.weight"]
    )


def test_literal_policies_start_at_the_first_layer_that_sees_the_video(testbed, shallow, tmp_path):
    run(testbed, tmp_path / "paper", "cacovid", "paper", steps=1, body_lr=0.0)
    from vidsieve import load

    policy, adapter = load(tmp_path / "paper" / "policy").policy, adapter_for(testbed[0])
    assert torch.equal(
        policy.layers[0].self_attn.q_proj.weight, adapter.layer_state(2).weights["self_attn.q_proj.weight"]
    )
    with pytest.raises(TrainingError, match="'official' starts from the LLM's layer 0, which has sliding"):
        run(testbed, tmp_path / "official", "cacovid", "official", steps=1)
    run(shallow, tmp_path / "shallow", "cacovid", "official", steps=1, prompts_per_step=1)


def test_captions_that_one_token_predicts_are_an_error_before_training(shallow, tmp_path, monkeypatch):
    monkeypatch.setattr(Rollouts, "caption_ce", lambda self, kept: torch.full((len(kept),), 1.5))
    with pytest.raises(TrainingError, match=r"single token predicts the captions .* \(cross-entropy 1.500 and 1.500\)"):
        run(shallow, tmp_path, "score", "paper", steps=1, prompts_per_step=2)
    assert not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path)
    run(shallow, tmp_path / "group", "score", steps=1, prompts_per_step=2)

    def hardly_better(self, kept):
        single = not isinstance(kept, torch.Tensor) and len(kept[0].indices) == 1
        return torch.full((len(kept),), 1.5 * (1.015 if single else 1))

    monkeypatch.setattr(
        Rollouts, "caption_ce", hardly_better
    )  # above the 1 % of pseudo-videos, below the 2 % of others
    run(shallow, tmp_path / "pseudo", "score", "paper", steps=1, prompts_per_step=2, pseudo_steps=1)
    with pytest.raises(TrainingError, match="a single token predicts"):
        run(shallow, tmp_path / "real", "score", "paper", steps=1, prompts_per_step=2)


@pytest.mark.parametrize("world", ["dense", "sparse"])
def test_the_captions_of_the_worlds_need_the_video(shallow, world):
    prompts = ScenePrompts(adapter_for(shallow[0]), shallow[1], world, seed=3)
    for number in range(2):
        rollouts = Rollouts(prompts.adapter, prompts.caption(number).inputs)
        masks = torch.zeros(2, TOKENS, dtype=torch.bool)
        masks[0], masks[1, 300] = True, True
        full, one = rollouts.caption_ce(masks).tolist()
        assert one > 1.5 * full


def test_a_world_is_for_the_testbeds_scenes_only(testbed, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(TrainingError, match="world chooses the testbed's scenes"):
        train_policy("cacovid", *testbed, tmp_path / "run", {"world": "sparse"}, files=Files(tmp_path / "rows.jsonl"))
    with pytest.raises(UnknownNameError, match="world"):
        train_policy("cacovid", *testbed, tmp_path / "run", {"world": "sparser"})
