"""What each training-free method keeps, against its definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidsieve import load, registry
from vidsieve.compressors import _clustering
from vidsieve.compressors.aot import anchors, merged_along, merged_within, plan
from vidsieve.compressors.divprune import diverse_picks
from vidsieve.compressors.downsample import tile_frame
from vidsieve.compressors.inside import LayerChoice
from vidsieve.compressors.vidcom2 import low_variance_channels
from vidsieve.errors import BudgetError, NeedError, PolicyError, SelectionError, UnknownNameError
from vidsieve.selection import kept_tokens
from vidsieve.testing import GivenView, make_video
from vidsieve.testing.checks import WIDTH, example
from vidsieve.types import EncoderOutputs, Stage, TokenGrid, Tokens, VideoTokens

METHODS = [
    name
    for name, method in ((name, registry.compressors.get(name)) for name in registry.compressors)
    if method.stage is not Stage.LAYER or hasattr(method, "inner")
]
FLOORS = {"dycoke": lambda grid: -(-grid.frames // 4), "evs": lambda grid: 1, "framefusion": lambda grid: 1}
"""Frames that a method keeps whole, whatever the retention."""
grids = st.builds(TokenGrid, st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None)
@given(grid=grids, part=st.integers(1, 100), seed=st.integers(0, 3), half=st.booleans())
def test_every_method_keeps_exactly_its_budget(name, grid, part, seed, half):
    dtype = torch.bfloat16 if half else torch.float32
    video = make_video(grid, seed=seed, dtype=dtype)
    compressor = example(registry.compressors.get(name), retention=part / 100)
    try:
        chosen = compressor.compress(video, generator=torch.Generator().manual_seed(seed))
    except BudgetError as error:
        assert part / 100 * grid.num_tokens < FLOORS[name](grid) * grid.per_frame, error
        return
    assert chosen.num_kept == kept_tokens(part / 100, grid.num_tokens)
    assert int(chosen.indices[-1]) < grid.num_tokens
    again = compressor.compress(video, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(chosen.indices, again.indices)
    if chosen.embeds is not None:
        assert chosen.embeds.dtype == dtype and torch.equal(chosen.embeds, again.embeds)
    if part == 100:
        assert torch.equal(chosen.indices, torch.arange(grid.num_tokens))


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation makes; views of what was there do not count."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)
        }
        made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.found = max(self.found, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("variant", ["ours", "official"])
@pytest.mark.parametrize("name", METHODS)
def test_no_method_makes_a_second_copy_of_the_video(name, variant, monkeypatch):
    monkeypatch.setattr(_clustering, "_BLOCK", 2**18)  # small as the video is
    method = registry.compressors.get(name)
    if method.trained or variant not in method.variants:
        pytest.skip("a policy's network reads all tokens" if method.trained else "no such variant")
    grid = TokenGrid(64, 8, 8)
    video = make_video(grid, 1024, dtype=torch.bfloat16)
    compressor, held = example(method, retention=0.3 if name == "dycoke" else 0.1, variant=variant), video.embeds.nbytes
    with Largest() as largest:
        compressor.compress(video)
    allowed = 2 * held + 1 if name == "aot" else held  # which sees all frames at once in float32
    assert largest.found < allowed


def test_vidcom2_finds_the_channels_that_vary_least():
    draw = torch.Generator().manual_seed(0)
    tokens = 100 + torch.randn(700, 24, generator=draw) * torch.rand(24, generator=draw)  # more than two blocks
    tokens[:, [5, 9, 20]] = 0.1  # exactly constant: the first of them all
    wanted = tokens.double().var(0, unbiased=False)
    assert torch.equal(low_variance_channels(tokens), wanted.sort(stable=True).indices[:12].sort().values)
    assert low_variance_channels(torch.full((300, 6), 0.1)).tolist() == [0, 1, 2]


def brute_force_picks(unit, count):
    """Return the max-min picks by their definition, from all distances in double precision."""
    return brute_force(unit, count)[0]


def brute_force(unit, count):
    """Return the max-min picks, and each token's distance to the nearest of them; for a pick: of those before it."""
    distance = 1 - unit.double() @ unit.double().T
    alone = distance.clone().fill_diagonal_(torch.inf).amin(1)
    picks = [int(alone.argmax())]
    radii = [float(distance[picks[0]].max())]
    while len(picks) < count:
        nearest = distance[picks].amin(0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
        radii.append(float(nearest.max()))
    distances = distance[picks].amin(0)
    distances[picks] = torch.tensor(radii, dtype=torch.float64)
    return picks, distances


@pytest.mark.parametrize(("tokens", "width", "count"), [(1, 4, 1), (7, 3, 7), (300, 16, 300), (2500, 24, 400)])
def test_divprune_equals_its_definition(tokens, width, count):
    for seed in range(3):
        features = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
        unit = torch.nn.functional.normalize(features, dim=1)
        picks, distances = brute_force(unit, count)
        found = diverse_picks(features, count)
        assert found[0].tolist() == picks
        assert torch.allclose(found[1].double(), distances, atol=2e-6)
        assert found[1].topk(count).values.min() >= distances[picks[-1]] - 2e-6, (
            "no token is farther than the last pick"
        )


def test_divprune_on_clusters_wider_than_its_pool():
    """Many near-equal tokens outside the candidate pool: the pool must notice when it runs dry."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 16, generator=draw)
    features = centres.repeat_interleave(60, 0) + 0.01 * torch.randn(2400, 16, generator=draw)
    unit = torch.nn.functional.normalize(features, dim=1)
    assert diverse_picks(features, 120)[0].tolist() == brute_force_picks(unit, 120)


def test_divprune_with_duplicates():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).repeat(40, 1)
    ours = diverse_picks(features, 300)[0].tolist()
    assert len(set(ours)) == 300
    assert len({i % 50 for i in ours[:50]}) == 50, "every different token comes before any duplicate"
    released = diverse_picks(features, 60, repeat=True)[0].tolist()
    assert len(set(released)) < 60


def test_divprune_takes_the_lowest_of_equal_tokens():
    embeds = torch.eye(3).repeat(4, 1)  # every frame shows the same three tokens
    video = VideoTokens(embeds, TokenGrid(4, 1, 3), torch.arange(12)[None])
    assert load("divprune", retention=Tokens(3)).compress(video).indices.tolist() == [0, 1, 2]
    five = load("divprune", retention=Tokens(5)).compress(video)
    assert five.indices.tolist() == [0, 1, 2, 3, 4]
    assert five.scores.tolist() == [1.0] * 3 + [0.0] * 9, "a duplicate of a pick has no distance to it"
    assert diverse_picks(embeds, 5, repeat=True)[0].tolist() == [0, 1, 2, 0, 0], "the release stays at the first"


def test_divprune_official_rounds_half_to_even():
    video = make_video(TokenGrid(1, 5, 5))
    official, ours = load("divprune", retention=0.1, variant="official"), load("divprune", retention=0.1)
    assert official.compress(video).num_kept == 2  # 2.5 → 2
    assert ours.compress(video).num_kept == 2
    assert load("divprune", retention=0.3, variant="official").compress(video).num_kept == 8  # 7.5 → 8
    assert load("divprune", retention=0.3).compress(video).num_kept == 7


def test_frame_difference_keeps_what_changed():
    grid = TokenGrid(4, 2, 3)
    embeds = torch.ones(grid.num_tokens, 5)
    embeds[13] += 3  # one token of frame 2 flashes: it changes there, and back in frame 3
    video = VideoTokens(embeds, grid, torch.arange(grid.num_tokens)[None])
    chosen = load("frame_difference", retention=Tokens(2), first_frame="next").compress(video)
    assert chosen.indices.tolist() == [13, 19]
    virtual = load("frame_difference", retention=Tokens(8)).compress(video)
    assert virtual.indices.tolist() == [0, 1, 2, 3, 4, 5, 13, 19], "the virtual zero frame keeps frame 0"


def test_uniform_is_even_in_time_and_space():
    grid = TokenGrid(8, 6, 6)
    chosen = load("uniform", retention=0.25).compress(make_video(grid)).indices
    per_frame = torch.bincount(chosen // 36, minlength=8)
    assert per_frame.tolist() == [9] * 8
    gaps = (chosen[1:] - chosen[:-1])[(chosen[1:] // 36) == (chosen[:-1] // 36)]
    assert int(gaps.min()) >= 4 and int(gaps.max()) <= 4
    assert len(set((chosen % 36).tolist())) > 20, "frames show different places"


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_tiles_cut_a_frame_into_connected_rectangles(height, width, data):
    tiles = data.draw(st.integers(1, height * width))
    labels = tile_frame(height, width, tiles)
    assert sorted(set(labels.flatten().tolist())) == list(range(tiles))
    for tile in range(tiles):
        rows, columns = (labels == tile).nonzero(as_tuple=True)
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert int(area) == len(rows), "a tile is a full rectangle"


def test_downsample_is_the_mean_of_each_tile():
    grid = TokenGrid(2, 4, 4)
    video = make_video(grid)
    chosen = load("downsample", retention=0.25).compress(video)  # four quarters of each frame
    frames = video.embeds.reshape(2, 2, 2, 2, 2, WIDTH)
    assert torch.allclose(chosen.embeds, frames.mean((2, 4)).reshape(8, WIDTH), atol=1e-6)
    whole = load("downsample", retention=Tokens(1)).compress(video)
    assert torch.allclose(whole.embeds[0], video.embeds.mean(0), atol=1e-6)


def test_downsampling_passes_gradients():
    video = make_video(TokenGrid(2, 4, 4))
    video.embeds.requires_grad_()
    load("downsample", retention=0.25).compress(video).embeds.sum().backward()
    assert torch.allclose(video.embeds.grad, torch.full_like(video.embeds, 0.25))


def test_dycoke_keeps_the_first_of_equal_tokens():
    video = make_video(TokenGrid(6, 3, 3))
    still = dataclasses.replace(video, embeds=video.embeds[:9].repeat(6, 1))
    kept = load("dycoke", retention=0.6, inner=False).compress(still).indices  # 18 of two whole frames, 14 of four
    assert [(kept[kept // 9 == frame] % 9).tolist() for frame in (1, 2, 3, 5)] == [[0, 1, 2], [0, 1, 2, 3]] * 2


def test_dycoke_as_released_takes_counts_as_ours_and_all_tokens_as_they_are():
    def method(budget, variant):
        return load("dycoke", retention=budget, variant=variant, inner=False)

    nine, four = make_video(TokenGrid(9, 3, 3)), make_video(TokenGrid(4, 3, 3))
    for count in (40, 81):
        kept = [method(Tokens(count), variant).compress(nine).indices for variant in ("ours", "official")]
        assert len(kept[0]) == count and torch.equal(*kept)
    assert all(method(1.0, "official").compress(video).num_kept == video.num_tokens for video in (nine, four))
    for budget, video, message in ((Tokens(82), nine, "more than the video's 81"), (0.5, four, "five frames or more")):
        with pytest.raises(BudgetError, match=message):
            method(budget, "official").compress(video)


def test_random_differs_by_seed():
    video, method = make_video(TokenGrid(8, 6, 6)), load("random", retention=0.1)
    picks = [method.compress(video, generator=torch.Generator().manual_seed(s)).indices for s in range(5)]
    assert all(not torch.equal(picks[0], other) for other in picks[1:])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("holitom", {"longest": 0}, "longest must be a whole number ≥ 1, got 0"),
        ("holitom", {"longest": 2.0}, "longest must be a whole number ≥ 1"),
        ("holitom", {"inner_kept": 0}, r"inner_kept must be a number in \(0, 1\]"),
        ("fastvid", {"context": 1.0}, r"context must be a number in \[0, 1\)"),
        ("prunevid", {"threshold": float("nan")}, r"threshold must be a number in \[-1, 1\]"),
        ("framefusion", {"inner": 1}, "inner must be True or False, got 1"),
        ("flashvid", {"segment_threshold": float("nan")}, r"segment_threshold must be a number in \[-2, 1\]"),
        ("pyramiddrop", {"layers": (1, 1, 2)}, r"layers must be rising whole numbers from 1, as \(8, 16, 24\)"),
    ],
)
def test_fields_outside_their_bounds_are_refused(name, fields, message):
    with pytest.raises(BudgetError, match=message):
        load(name, **fields)


def test_bounds_that_are_closed_or_optional_hold_themselves():
    assert load("holitom", inner_kept=1, layer=None, centre_weight=0).inner_kept == 1
    assert load("dycoke", similarity=-1).similarity == -1


def test_a_list_of_layers_leaves_a_method_its_hash():
    for name in ("earlytom", "pyramiddrop"):
        assert hash(load(name, layers=[2, 4, 6])) == hash(load(name, layers=(2, 4, 6)))


def test_a_choice_inside_the_llm_is_checked():
    chosen = torch.tensor([0, 2, 3])
    assert LayerChoice(chosen, torch.zeros(3, 4), order=torch.tensor([3, 0, 2])).order.tolist() == [3, 0, 2]
    for wrong in (
        lambda: LayerChoice(torch.tensor([2, 0])),
        lambda: LayerChoice(chosen, torch.zeros(2, 4)),
        lambda: LayerChoice(chosen, order=torch.tensor([3, 0, 1])),
    ):
        with pytest.raises(SelectionError):
            wrong()
    with pytest.raises(NeedError, match="the view holds no hidden"):
        _ = GivenView(1, 2, TokenGrid(1, 1, 2), torch.arange(2)).hidden


def test_loading_by_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'divprune'"):
        load("divprun")
    with pytest.raises(UnknownNameError, match=r"field of uniform.*retention"):
        load("uniform", retension=0.5)
    with pytest.raises(UnknownNameError, match="variant of divprune"):
        load("divprune", variant="paper")
    assert load("divprune:official", retention=0.5) == load("divprune", variant="official", retention=0.5)
    with pytest.raises(PolicyError, match="takes no policy"):
        load("uniform", "some/folder")
    with pytest.raises(PolicyError, match=r"needs a trained policy.*or load\('score', 'testbed'\)"):
        load("score")
    with pytest.raises(
        PolicyError, match=r"needs a trained policy.*which `vidsieve train visionselector FOLDER` makes"
    ):
        load("visionselector")
    for name, message in (
        ("divprune+reuse", "unknown name before a \\+ 'divprune'.*comes before a method"),
        ("divprune+fastv", "two methods in a row are for `vidsieve.Pipeline`"),
        ("reuze+divprune", "Did you mean 'reuse'"),
    ):
        with pytest.raises(UnknownNameError, match=message):
            load(name)
    for name in ("score", "cacovid", "visionselector"):
        with pytest.raises(PolicyError, match="needs a trained policy"):
            registry.compressors.get(name)().compress(make_video(TokenGrid(2, 2, 2)))


def test_vcast_shares_what_rounding_leaves_over():
    generator = torch.Generator().manual_seed(3)
    grid = TokenGrid(8, 5, 5)
    video = VideoTokens(torch.randn(200, 16, generator=generator), grid, torch.arange(200)[None])
    counts = {}
    for variant in ("ours", "official"):
        kept = load("vcast", retention=0.3, variant=variant).compress(video)
        counts[variant] = torch.bincount(kept.indices // 25, minlength=8)
        assert kept.num_kept == 60
        quota = 1 + kept.frame_scores * (60 - 8)
        over = counts[variant] - quota
        # By largest remainder no count is a token off; the release gives one frame all that is left.
        assert bool((over.abs() < 1).all()) is (variant == "ours")
    assert int((counts["official"] - counts["ours"]).max()) >= 2
    assert int(((counts["official"] - counts["ours"]) > 0).sum()) == 1


def test_vcast_below_a_token_a_frame():
    video = VideoTokens(torch.randn(96, 8), TokenGrid(24, 2, 2), torch.arange(96)[None])
    assert load("vcast", retention=0.1).compress(video).num_kept == 9
    assert load("vcast", retention=0.1, variant="official").compress(video).num_kept == 24
    one = VideoTokens(torch.randn(9, 8), TokenGrid(1, 3, 3), torch.arange(9)[None])
    assert load("vcast", retention=0.5).compress(one).num_kept == 4
    assert load("vcast", retention=0.5, variant="official").compress(one).num_kept == 9


# -- gleanvid: no code is public, so an independent reading of the paper ----------------------------------------------


def glean_by_hand(x, grid, retention):
    """Equations 3 to 13 with explicit projections: a ridge inverse for novelty, least squares for spans."""
    frames, size = grid.frames, grid.per_frame
    mean = x.mean(0)
    centred = x - mean
    first = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    clean = (centred - (centred @ first)[:, None] * first[None] + mean).reshape(frames, size, -1)
    raw = x.reshape(frames, size, -1)

    def cell(t, n, of):
        row, column = n // grid.width // 2 * 2, n % grid.width // 2 * 2
        rows = [r for r in (row, row + 1) if r < grid.height]
        columns = [c for c in (column, column + 1) if c < grid.width]
        return torch.stack([of[t, r * grid.width + c] for r in rows for c in columns]).mean(0)

    news = torch.zeros(frames, dtype=x.dtype)
    for n in range(size):
        history = []
        for t in range(frames):
            z = cell(t, n, clean)
            if history:
                h = torch.stack(history)
                ridge = 1e-4 * (h @ h.T).trace() / len(h) * torch.eye(len(h), dtype=x.dtype)
                b = h @ z
                news[t] += (z @ z - b @ torch.linalg.inv(h @ h.T + ridge) @ b).clamp(min=0).sqrt()
            else:
                news[t] += z.norm()
            history.append(z)
    order = news.sort().values
    gini = (
        sum(2 * (i + 1) * float(r) for i, r in enumerate(order)) / (frames * float(news.sum())) - (frames + 1) / frames
    )
    even, budget = 0.6 - 0.4 * gini, kept_tokens(retention, frames * size)
    quota = even * budget / frames + (1 - even) * budget * news / news.sum()
    counts = quota.floor().long()
    for t in sorted(range(frames), key=lambda t: -float(quota[t] - quota[t].floor()))[: budget - int(counts.sum())]:
        counts[t] += 1
    kept = []

    def scaled(values):
        return [(v - min(values)) / ((max(values) - min(values)) or 1) for v in values]

    for t in range(frames):
        near, far, earlier = [], [], clean.flatten(0, 1)[kept].T
        for n in range(size):
            token, c, f = raw[t, n], cell(t, n, raw), raw[t].mean(0)
            likeness = float(token @ c / token.norm() / c.norm() - token @ f / token.norm() / f.norm())
            near.append(math.log1p(math.exp(4 * likeness)) / 4)
            rest = clean[t, n]
            if kept:
                rest = rest - earlier @ torch.linalg.lstsq(earlier, rest[:, None], driver="gelsd").solution[:, 0]
            far.append(float(rest.norm()) if rest.norm() > 1e-8 else 0.0)
        score = [u + v for u, v in zip(scaled(near), scaled(far), strict=True)]
        kept += sorted(t * size + n for n in sorted(range(size), key=lambda n: -score[n])[: int(counts[t])])
    return kept


@pytest.mark.parametrize("width", [48, 12], ids="{} channels".format)
@pytest.mark.parametrize("grid", [TokenGrid(5, 4, 4), TokenGrid(4, 3, 5), TokenGrid(1, 4, 4)], ids=str)
def test_gleanvid_equals_the_papers_equations(grid, width):
    """With 12 channels the tokens kept first span all others, so that rounding must not decide."""
    generator = torch.Generator().manual_seed(grid.width)
    x = torch.randn(grid.num_tokens, width, generator=generator, dtype=torch.float64) + 2
    video = VideoTokens(x.float(), grid, torch.arange(grid.num_tokens)[None])
    kept = load("gleanvid", retention=0.3).compress(video).indices
    assert kept.tolist() == glean_by_hand(x, grid, 0.3)


@pytest.mark.parametrize("rank", [1, 3, 128])
def test_gleanvids_direction_is_the_first_singular_vector(rank):
    from vidsieve.compressors.gleanvid import without_bias

    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(800, rank, generator=generator) @ torch.randn(rank, 128, generator=generator)
    x = torch.randn(800, 128, generator=generator) if rank == 128 else x  # nearly equal singular values
    centred = (x - x.mean(0)).double()
    first = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    wanted = centred - (centred @ first)[:, None] * first
    found = without_bias(x[None], recentred=False)[0]
    assert float((found - wanted).norm() / centred.norm()) < 1e-5


def test_gleanvids_scores_do_not_follow_rounding():
    """Tokens of one direction are equally like cell and frame: their norms alone decide."""
    norms = torch.rand(36, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    line = norms * torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    video = VideoTokens(line, TokenGrid(1, 6, 6), torch.arange(36)[None])
    kept = load("gleanvid", retention=0.25, debiased=False).compress(video).indices
    assert kept.tolist() == sorted(norms.flatten().topk(9).indices.tolist())


def test_gleanvids_span_does_not_grow_over_a_still_passage():
    from vidsieve.compressors.gleanvid import complementary, scaled

    generator = torch.Generator().manual_seed(0)
    still, new = torch.randn(2, 6, 32, generator=generator).unbind()
    tokens = torch.stack([still] * 8 + [new])
    _, scores = complementary(torch.ones(9, 6), tokens, [6] * 9, 1e-4)
    apart = new - still.T.matmul(torch.linalg.lstsq(still.T, new.T).solution).T
    torch.testing.assert_close(scores[-1], scaled(apart.norm(dim=1)), atol=1e-4, rtol=0)


def test_gleanvids_open_choices_change_what_is_kept():
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(8, 6, 6)
    video = VideoTokens(torch.randn(288, 32, generator=generator) + 1, grid, torch.arange(288)[None])
    plain = load("gleanvid").compress(video).indices
    for field, value in {"debiased": False, "recentred": False, "sliding": True, "sharpness": 40.0}.items():
        other = load("gleanvid", **{field: value}).compress(video).indices
        assert len(other) == len(plain) and not torch.equal(other, plain), field


def test_gleanvid_on_still_and_empty_videos():
    grid = TokenGrid(4, 3, 3)
    for tokens in (torch.zeros(36, 8), torch.ones(36, 8), torch.randn(1, 8).expand(36, 8).contiguous()):
        kept = load("gleanvid", retention=0.5).compress(VideoTokens(tokens, grid, torch.arange(36)[None]))
        assert kept.num_kept == 18 and bool(torch.isfinite(kept.scores).all())


# -- aot --------------------------------------------------------------------------------------------------------------


def clip_video(frames=8, side=6, width=16):
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(frames, side, side)
    tokens = torch.randn(grid.num_tokens, width, generator=generator)
    attention = torch.rand(grid.num_tokens, generator=generator)
    return VideoTokens(tokens, grid, torch.arange(grid.num_tokens)[None], encoder=EncoderOutputs(attention))


def test_aot_puts_a_merged_anchor_in_place_of_its_own_and_as_released_beside_it():
    video = clip_video()
    grid, attention, frames = video.grid, video.encoder.attention.reshape(8, -1), video.embeds.reshape(8, 36, -1)

    kept = load("aot", retention=0.25).compress(video)  # two clips of 36 tokens: 18 anchors, and 6 in three frames each
    assert torch.bincount(kept.indices // 36).tolist() == [18, 6, 6, 6] * 2
    places = anchors(attention[:4], attention[:4], grid, 18, 0.5)
    within = merged_within(frames[:4], places, grid)
    along, masks = merged_along(list(within), 0.3, 1.0, [6, 6, 6])
    assert torch.equal(kept.indices[:18], places[0])
    assert torch.allclose(kept.embeds[:18], along, atol=1e-5)
    assert torch.allclose(kept.embeds[18:24], within[1][masks[0]], atol=1e-5)

    # 12 anchors a frame, of which 6 are the windows' and lost.
    kept = load("aot", retention=0.25, variant="official").compress(video)
    places = anchors(attention, attention, grid, 12, 0.5, lossy=True)
    within = merged_within(frames, places, grid, official=True)
    along, masks = merged_along(list(within[:4]), 0.3, 1.0)
    clip = kept.indices < 4 * 36
    assert torch.equal(kept.indices[:6], places[0]) and int(clip.sum()) == 12 + sum(int(mask.sum()) for mask in masks)
    assert torch.allclose(kept.embeds[:6], within[0], atol=1e-5)
    assert bool((kept.indices[clip][-6:] >= 3 * 36).all())
    for row in along:
        assert bool(torch.isclose(kept.embeds[clip], row, atol=1e-5).all(1).any())


def test_aot_loses_the_windows_remainder_only_as_released():
    attention = clip_video(2).encoder.attention.reshape(2, 36)
    grid = TokenGrid(2, 6, 6)
    assert anchors(attention, attention, grid, 30, 0.5).shape == (2, 30)
    assert anchors(attention, attention, grid, 30, 0.5, lossy=True).shape == (2, 24)  # 9 of 15, and 15
    # Of each 2 × 2 window the best is there.
    best = attention.reshape(2, 3, 2, 3, 2).amax((2, 4)).flatten(1)
    for row, chosen, peaks in zip(attention, anchors(attention, attention, grid, 18, 0.5), best, strict=True):
        assert bool(torch.isin(peaks, row[chosen]).all()) and len(chosen.unique()) == 18


def test_aot_merges_a_frame_without_looking_at_others_but_as_released():
    video = clip_video(frames=6)
    grid, frames = video.grid, video.embeds.reshape(6, 36, -1) * torch.tensor([0.01, 1, 1, 1, 1, 1])[:, None, None]
    frames[0] = frames[0] + 1
    places = torch.arange(36).expand(6, -1)[:, ::4]
    for official in (False, True):
        whole = merged_within(frames, places, grid, official)
        alone = merged_within(frames[:1], places[:1], grid, official)
        assert torch.allclose(whole[:1], alone, atol=1e-6) is not official


def test_aots_released_transport_hardly_moves_an_anchor():
    video = clip_video()
    frames, grid = video.embeds.reshape(8, 36, -1), video.grid
    places = torch.arange(36).expand(8, -1)[:, ::4]
    own = frames.gather(1, places[..., None].expand(-1, -1, 16))
    moved = {
        official: float((merged_within(frames, places, grid, official) - own).norm()) for official in (False, True)
    }
    assert moved[False] > 2 * moved[True]
    found = plan(torch.rand(3, 20, 5))
    assert torch.allclose(found.sum(1), torch.full((3, 5), 0.2)) and torch.allclose(
        found.sum(2), torch.full((3, 20), 0.05), rtol=0.1
    )


@pytest.mark.parametrize("variant", ["ours", "official"])
def test_aot_on_long_vectors_in_half_precision(variant):
    """Products of two such tokens are more than float16 holds."""
    video = clip_video(width=64)
    method, results = load("aot", retention=0.25, variant=variant), []
    for dtype in (torch.float16, torch.float32):
        tokens = (video.embeds * 60).to(torch.float16).to(dtype)  # of norm 480
        results.append(method.compress(dataclasses.replace(video, embeds=tokens)))
    half, single = results
    assert torch.equal(half.indices, single.indices)
    assert torch.allclose(half.embeds.float(), single.embeds, rtol=5e-3, atol=1)


def test_aot_as_released_keeps_an_anchor_where_windows_have_them_all():
    kept = load("aot", retention=0.05, variant="official", global_share=0.0).compress(clip_video())
    assert kept.num_kept == 4


def test_aot_on_still_and_empty_videos():
    for tokens in (torch.zeros(72, 8), torch.ones(72, 8), torch.randn(1, 8).expand(72, 8).contiguous()):
        video = VideoTokens(
            tokens, TokenGrid(8, 3, 3), torch.arange(72)[None], encoder=EncoderOutputs(torch.full((72,), 0.1))
        )
        for variant in ("ours", "official"):
            kept = load("aot", retention=0.5, variant=variant).compress(video)
            assert torch.allclose(kept.embeds, tokens[:1].expand_as(kept.embeds), atol=1e-5)


def test_visionselector_official_rounds_down_in_floating_point():
    video, method = make_video(TokenGrid(4, 5, 5)), registry.compressors.get("visionselector")
    kept = {variant: example(method, retention=0.29, variant=variant).compress(video) for variant in method.variants}
    assert {variant: selection.num_kept for variant, selection in kept.items()} == {"ours": 29, "official": 28}
    for retention, count in ((0.001, 1), (1.0, 100), (Tokens(7), 7)):
        assert example(method, retention=retention, variant="official").compress(video).num_kept == count
    same = VideoTokens(torch.ones(12, WIDTH), TokenGrid(3, 2, 2), torch.arange(12)[None])
    assert example(method, retention=0.5).compress(same).indices.tolist() == list(range(6)), "ties to the lower index"


@pytest.mark.parametrize("name", [name for name in METHODS if not registry.compressors.get(name).trained])
def test_autocast_changes_no_selection(name):
    method = example(registry.compressors.get(name), retention=0.3)
    video = make_video(TokenGrid(8, 8, 8), 64)
    plain = method.compress(video)
    with torch.autocast("cpu", torch.bfloat16):
        cast = method.compress(video)
    assert torch.equal(plain.indices, cast.indices)
