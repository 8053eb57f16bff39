"""Policy files, and the networks against the models and formulas they come from."""

from __future__ import annotations

import copy
import json
import pickle
from typing import get_args

import pytest
import torch

from vidsieve import load
from vidsieve.adapters import adapter_for
from vidsieve.compressors._decoder import BlockShape, DecoderBlock
from vidsieve.compressors._question import Match
from vidsieve.compressors.cacovid import CaCoVID, CaCoVIDPolicy, official_selection
from vidsieve.compressors.score import Score, ScorePolicy
from vidsieve.compressors.visionselector import VisionSelectorPolicy
from vidsieve.errors import NeedError, OutputError, PolicyError, PolicyMismatchError, UnknownNameError
from vidsieve.testing import make_video
from vidsieve.testing.checks import WIDTH
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import Need, TokenGrid, Tokens

GRID = TokenGrid(4, 3, 3)


@pytest.fixture
def folder(tmp_path):
    ScorePolicy.start(WIDTH, "llava_onevision", hidden=16, seed=3).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_variant_and_policy_go_together(tmp_path):
    for variant in ("ours", "paper", "official"):
        assert load("cacovid", "testbed", variant=variant).policy.config.variant == variant
    assert load("score", "testbed").policy.config.variant == "ours"
    for trained, asked in (("ours", "paper"), ("paper", "ours"), ("ours", "official")):
        CaCoVIDPolicy.of_shape(BlockShape(WIDTH, 2, 1, 16, 48), "none", variant=trained).save_pretrained(tmp_path)
        with pytest.raises(PolicyMismatchError, match=f"trained as variant {trained!r}, not {asked!r}"):
            load("cacovid", tmp_path, variant=asked)


def test_the_folder_of_a_run_stands_for_its_policy(folder):
    assert isinstance(load(folder.parent), Score) and isinstance(load("score", folder.parent), Score)


def test_weights_that_are_not_numbers_are_refused(folder):
    policy = ScorePolicy.from_pretrained(folder)
    policy.out.weight.data[0, 0] = float("nan")
    policy.save_pretrained(folder)
    with pytest.raises(PolicyError, match="not all finite"):
        load(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScorePolicy.start(WIDTH, "llava_onevision", hidden=16),
        lambda: CaCoVIDPolicy.of_shape(BlockShape(WIDTH, 2, 1, 16, 48), "llava_onevision", variant="paper"),
        lambda: CaCoVIDPolicy.of_shape(BlockShape(WIDTH, 2, 1, 16, 48), "llava_onevision", variant="ours"),
    ],
)
def test_a_saved_policy_scores_the_same(make, tmp_path):
    policy, video = make().eval(), make_video(GRID)
    policy.save_pretrained(tmp_path)
    again = type(policy).from_pretrained(tmp_path)
    with torch.no_grad():
        before, after = policy(video), again(video)
    for a, b in zip(
        before if isinstance(before, tuple) else (before,), after if isinstance(after, tuple) else (after,), strict=True
    ):
        assert torch.equal(a, b)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    stamped = json.loads((tmp_path / "config.json").read_text())
    assert {"vidsieve_version", "format", "hidden_size", "family", "training", "variant", "type"} <= stamped.keys()
    assert list(stamped) == sorted(stamped)


def test_loading_by_folder_takes_method_and_variant_from_the_file(folder):
    method = load(folder, retention=0.5)
    assert isinstance(method, Score) and method.variant == "ours" and method.retention == 0.5
    assert isinstance(load("score", folder), Score)
    with pytest.raises(PolicyError, match="holds a score policy, not a cacovid policy"):
        load("cacovid", folder)


def test_only_safetensors_is_loaded(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"token.weight": 1}))
    with pytest.raises(PolicyError, match=r"pytorch_model.bin will not be loaded, because pickles can run code"):
        load(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps({"token.weight": 1}))
    with pytest.raises(PolicyError, match="no readable safetensors file"):
        load(folder)


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_corrupt_weights_are_refused(folder, harm):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncate": data[: len(data) // 2], "flip": b"\xff" * 8 + data[8:], "empty": b""}[harm])
    with pytest.raises(PolicyError, match=r"model\.safetensors"):
        load(folder)


def test_corrupt_configurations_are_refused(folder):
    path = folder / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"hidden_size": 16}))
    with pytest.raises(PolicyError, match=r"config\.json was damaged or edited .*checksum differs"):
        load("score", folder)
    del good["checksum"]
    for text, message in [
        ("{", "not JSON"),
        ("[1]", "not the configuration"),
        (json.dumps({"a": 1}), "not the configuration"),
        (json.dumps({k: v for k, v in good.items() if k != "family"}), "damaged: .*missing required field `family`"),
        (json.dumps(good | {"hidden_size": "wide"}), "damaged: Expected `int`"),
        (json.dumps(good | {"hidden_size": 16}), "do not fit"),
        (json.dumps(good | {"network": {"hidden": 99}}), "do not fit"),
    ]:
        path.write_text(text)
        with pytest.raises(PolicyError, match=message):
            load("score", folder)
    path.write_text(json.dumps(good | {"format": 99, "vidsieve_version": "9.0"}))
    with pytest.raises(PolicyMismatchError, match=r"written by vidsieve 9\.0.*upgrade"):
        load("score", folder)
    path.unlink()
    with pytest.raises(PolicyError, match="vidsieve train"):
        load("score", folder)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    policy = ScorePolicy.start(WIDTH, "llava_onevision", hidden=16)
    policy.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vidsieve.io.tensors.save_file", fails)
    with pytest.raises(OutputError, match="No space left"):
        policy.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(OutputError, match="cannot write"):
        policy.save_pretrained("/proc/nowhere")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_is_the_models_own_layer_0_made_bidirectional(family):
    model = FAMILIES[family]()
    adapter = adapter_for(model)
    inputs = inputs_for(family, [[default_grid(family)]])
    with torch.no_grad():
        encoded = adapter.encode(inputs)
        prompt = adapter.prompt(encoded, 0)
        state = adapter.layer_state(0)
        block = DecoderBlock(state.shape)
        block.load_state_dict(state.weights)
        layer = copy.deepcopy(adapter.decoder_layers[0])
        layer.self_attn.is_causal = False
        rotary = adapter.language_model.rotary_emb(
            prompt.embeds[None], prompt.positions[:, None] if len(prompt.positions) > 1 else prompt.positions
        )
        everything = torch.ones(1, 1, *[prompt.embeds.shape[0]] * 2, dtype=torch.bool)
        theirs = layer(prompt.embeds[None], attention_mask=everything, position_embeddings=rotary)[0]
        ours = block(prompt.embeds, prompt.positions)
        causal = block(prompt.embeds, prompt.positions, causal=True)
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float((causal - theirs).abs().max()) > 1e-2
    sections = {"qwen2_5_vl": (2, 3, 3), "qwen3_vl": (4, 2, 2)}
    assert state.shape.rope_sections == sections.get(family, ())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_look_is_layer_0_attention_of_the_question(family):
    """`FirstLook` gives the log of layer 0's attention from question words to video tokens, over the video only."""
    model = FAMILIES[family]()
    adapter, inputs = adapter_for(model), inputs_for(family, [[default_grid(family)]])
    with torch.no_grad():
        encoded = adapter.encode(inputs)
        video = adapter.video_tokens(encoded, 0, frozenset({Need.QUESTION}))
        state = adapter.layer_state(0)
        policy = CaCoVIDPolicy.of_shape(state.shape, family, layers=[state.weights], scorer={"first_look": True})
        look = policy.scorer.first_look(video, video.prompt)  # (H, words, N)
        block = DecoderBlock(state.shape)
        block.load_state_dict(state.weights)
        from vidsieve.compressors._decoder import rotary

        x, turn = block.input_layernorm(video.prompt.embeds), rotary(video.prompt.positions, state.shape)
        q, k = block.self_attn.queries(x, turn), block.self_attn.keys(x, turn)
    heads = state.shape.num_heads // state.shape.num_kv_heads
    for h in range(state.shape.num_heads):
        weights = (q[h] @ k[h // heads].T / state.shape.head_dim**0.5)[video.prompt.question_mask][
            :, video.prompt.video_mask
        ]
        wanted = weights.softmax(1) * video.num_tokens
        assert torch.allclose(look[h].exp(), wanted, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in policy.scorer.first_look.parameters())
    scores = policy(video)[0].diff(dim=1)[:, 0]
    assert torch.allclose(scores, 0.25 * look.clamp(-8, 8).amax((0, 1)), atol=1e-5), (
        "the order that training starts from"
    )


@pytest.mark.parametrize("match", get_args(Match))
def test_the_question_path_word_by_word(match):
    """The scores of `QuestionScorer` from a loop over tokens and words, for every form of the match."""
    video = make_video(TokenGrid(3, 2, 2))
    policy = CaCoVIDPolicy.of_shape(
        BlockShape(WIDTH, 2, 1, WIDTH // 2, 2 * WIDTH), "none", scorer={"match": match, "match_width": 5}
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = policy(video)[0]
        for parameter in policy.parameters():
            parameter.normal_(0, 0.3, generator=draw)
        scores, s = policy(video), policy.scorer
        words = video.prompt.embeds[video.prompt.question_mask]
        words = s.norm_word(words.mean(0, keepdim=True) if match == "mean" else words)
        wanted = []
        for n in range(video.num_tokens):
            x = s.norm_token(video.embeds[n])
            change = x - s.norm_token(video.embeds[n - 4]) if n >= 4 else x
            hidden = torch.cat([s.content(x), s.change(change)])
            matches = torch.stack([s.key(x) @ s.query(w) / 5**0.5 for w in words])
            weight = matches.softmax(0)
            total = matches.sum() if match in ("sum", "mean") else (weight * matches).sum()
            if match == "cross_attention":
                hidden, total = hidden + s.words((weight[:, None] * s.query(words)).sum(0)), 0.0
            wanted.append(total + s.head(hidden)[0])
    assert not bool(before.any()), "without training, every token is as good as any other"
    wanted = torch.stack(wanted)
    assert torch.allclose(scores[0][:, 1] - scores[0][:, 0], wanted, atol=1e-4)
    assert torch.allclose(scores[1][:, 1] - scores[1][:, 0], wanted.reshape(3, 4).amax(1), atol=1e-4)


def test_scores_without_the_concatenation():
    """W₁X + W₂ΔX, chunk by chunk, equals one linear layer on [X; ΔX] with a zero frame before the first."""
    video = make_video(TokenGrid(7, 3, 4))
    for residual in (True, False):
        policy = ScorePolicy.start(WIDTH, "none", variant="paper", hidden=24, residual=residual)
        torch.nn.init.normal_(policy.out.weight)
        frames = video.embeds.reshape(7, 12, WIDTH)
        delta = torch.cat([frames[:1], frames[1:] - frames[:-1]])
        hidden = frames @ policy.token.weight.T + policy.token.bias
        if residual:
            hidden = hidden + delta @ policy.surprise.weight.T
        wanted = (torch.nn.functional.gelu(hidden) @ policy.out.weight.T + policy.out.bias).flatten()
        for chunk in (1, 12, 30, 10_000):
            got = policy.logits(video.embeds, video.grid, chunk_tokens=chunk)
            assert torch.allclose(got, wanted, atol=1e-5), chunk


def test_visionselector_scores_are_means_over_all_pairs_of_tokens(monkeypatch):
    """Mean over all keys of q·k / √h, from the matrix of all pairs; biases count."""
    policy, video = VisionSelectorPolicy.start(WIDTH, "none", seed=1).eval(), make_video(GRID)
    with torch.no_grad():
        for layer in (policy.query, policy.key):
            layer.bias.normal_(generator=torch.Generator().manual_seed(2))
        query, key = policy.query(video.embeds), policy.key(video.embeds)
        wanted = (query @ key.T).mean(1) / (WIDTH // 2) ** 0.5
        for chunk in (1, 7, 10_000):
            monkeypatch.setattr("vidsieve.compressors.visionselector.CHUNK_TOKENS", chunk)
            assert torch.allclose(policy(video), wanted, atol=1e-5), chunk


def test_a_visionselector_policy_serves_both_variants(tmp_path):
    policy = VisionSelectorPolicy.start(WIDTH, "none", variant="official", seed=1)
    assert 0 < float(policy.query.weight.detach().std()) < 2e-4, "as near to 0 as the release's"
    policy.save_pretrained(tmp_path)
    assert load(tmp_path).variant == "official"
    ours = load("visionselector", tmp_path, variant="ours")
    assert ours.variant == "ours" and torch.equal(ours.policy.key.weight, policy.key.weight)
    with pytest.raises(PolicyError, match="reads width"):
        ours.compress(make_video(GRID, WIDTH + 2))
    with pytest.raises(PolicyError, match="width of at least 2"):
        VisionSelectorPolicy.start(1, "none")


def make_score():
    return ScorePolicy.start(WIDTH, "none", hidden=64)


def make_cacovid(**fields):
    shape = BlockShape(WIDTH, 4, 2, WIDTH // 4, 2 * WIDTH)
    return CaCoVIDPolicy.of_shape(shape, "none", **fields)


def make_visionselector():
    return VisionSelectorPolicy.start(WIDTH, "none", seed=1)


@pytest.mark.parametrize("make", [make_score, make_visionselector, make_cacovid, lambda: make_cacovid(variant="paper")])
def test_scores_under_half_precision_do_not_tie(make):
    policy, video = make().eval(), make_video(TokenGrid(8, 8, 8), WIDTH)
    with torch.no_grad():
        for parameter in policy.parameters():  # so that a last layer that starts at zero says something
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        with torch.autocast("cpu", torch.bfloat16):
            out = policy(video)
    scores = out if isinstance(out, torch.Tensor) else out[0][:, 1] - out[0][:, 0]
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 0.9 * len(scores)


def test_scores_start_at_the_target_rate():
    policy = ScorePolicy.start(WIDTH, "none", hidden=16, target=0.2)
    torch.nn.init.zeros_(policy.out.weight)
    with torch.no_grad():
        assert float(policy(make_video(GRID)).sigmoid().mean()) == pytest.approx(0.2)


def test_question_awareness_of_each_body():
    """A swapped question moves the scores of every body but the causal one, which is blind as the release is."""
    video = make_video(GRID)
    prompt = video.prompt
    embeds = prompt.embeds.clone()
    embeds[prompt.question_mask] = torch.randn(int(prompt.question_mask.sum()), WIDTH)
    other = type(video)(
        video.embeds,
        video.grid,
        video.positions,
        type(prompt)(embeds, prompt.positions, prompt.video_mask, prompt.question_mask),
    )
    shape = BlockShape(WIDTH, 2, 1, 16, 48)
    for body, variant in [
        ("layer", "paper"),
        ("attention", "paper"),
        ("local", "paper"),
        ("question", "ours"),
        ("layer", "official"),
    ]:
        policy = CaCoVIDPolicy.of_shape(shape, "none", variant=variant, body=body).eval()
        with torch.no_grad():
            for parameter in policy.parameters():  # the question path starts without knowledge: its queries are zero
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            moved = float((policy(video)[0] - policy(other)[0]).abs().max())
        assert (moved == 0) if variant == "official" else (moved > 1e-6), (body, moved)


def test_local_body_does_not_see_other_frames():
    shape = BlockShape(WIDTH, 2, 1, 16, 48)
    video = make_video(GRID)
    changed = video.prompt.embeds.clone()
    changed[video.prompt.video_mask.nonzero().flatten()[-9:]] += 1  # the last frame
    other = type(video)(
        video.embeds,
        GRID,
        video.positions,
        type(video.prompt)(changed, video.prompt.positions, video.prompt.video_mask, video.prompt.question_mask),
    )
    for body, sees in (("local", False), ("layer", True)):
        policy = CaCoVIDPolicy.of_shape(shape, "none", variant="paper", body=body).eval()
        with torch.no_grad():
            moved = (policy(video)[0] - policy(other)[0])[:9].abs().max()
        assert bool(moved > 1e-6) == sees


@pytest.mark.parametrize("allocation", ["frame_avg", "frame_ada", "frame_ada_st", "global"])
def test_allocations(allocation):
    method = CaCoVID.untrained(WIDTH, variant="paper", allocation=allocation, retention=0.25)
    video = make_video(TokenGrid(8, 4, 4))
    chosen = method.compress(video)
    per_frame = torch.bincount(chosen.indices // 16, minlength=8)
    assert chosen.num_kept == 32
    if allocation == "frame_avg":
        assert per_frame.tolist() == [4] * 8
    if allocation == "frame_ada":
        wanted = chosen.frame_scores.softmax(0) * 32
        assert float((per_frame - wanted).abs().max()) <= 1
    if allocation == "frame_ada_st":
        assert int(per_frame.min()) >= 1, "the spread half reaches every frame"
        alone = CaCoVID(policy=method.policy, variant="paper", allocation="frame_ada", retention=Tokens(16)).compress(
            video
        )
        assert set(alone.indices.tolist()) <= set(chosen.indices.tolist())
    if allocation == "global":
        assert torch.equal(chosen.indices, chosen.scores.sort(descending=True, stable=True).indices[:32].sort().values)


def test_official_variant_runs_the_release_and_counts_by_floating_point():
    method = CaCoVID.untrained(WIDTH, variant="official", retention=0.29)
    video = make_video(TokenGrid(4, 5, 5))
    chosen = method.compress(video)
    wanted = official_selection(chosen.scores, chosen.frame_scores, video.grid, 0.29, 0.5, 1.5 * 0.29)[0]
    assert torch.equal(chosen.indices, wanted)
    assert chosen.num_kept == int(0.29 * 100) == 28


def test_unknown_settings_are_refused():
    with pytest.raises(UnknownNameError, match="allocation"):
        CaCoVID(allocation="frames")
    with pytest.raises(UnknownNameError, match="policy body"):
        CaCoVIDPolicy.of_shape(BlockShape(WIDTH, 2, 1, 16, 48), "none", body="layers")
    with pytest.raises(PolicyError, match="rope sections"):
        BlockShape(32, 2, 1, 16, 48, rope_sections=(1, 1, 1))
    with pytest.raises(PolicyError, match="cannot share"):
        BlockShape(32, 3, 2, 16, 48)
    with pytest.raises(PolicyError, match="position rows"):
        DecoderBlock(BlockShape(32, 2, 1, 16, 48))(torch.randn(4, 32), torch.zeros(3, 4, dtype=torch.int64))


def test_rope_of_an_unknown_type_is_refused():
    model = FAMILIES["llava_onevision"]()
    model.config.text_config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    with pytest.raises(NeedError, match="yarn"):
        adapter_for(model).layer_state(0)
