"""What published methods keep, against brute force and against their releases' recorded outputs."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsieve import load
from vidsieve.compressors import _clustering
from vidsieve.compressors._budgets import scaled_counts
from vidsieve.compressors.visionzip import merge
from vidsieve.errors import BudgetError
from vidsieve.testing import GivenView, make_video
from vidsieve.types import EncoderOutputs, TokenGrid, Tokens, VideoTokens

GRID = TokenGrid(8, 5, 7)


# -- EVS ----------------------------------------------------------------------------------------------------


def test_evs_keeps_the_first_frame_and_what_changed_most():
    video = make_video(GRID)
    rows = video.embeds.double().reshape(8, 35, -1)
    changed = {
        t * 35 + n: 1 - float(rows[t, n] @ rows[t - 1, n] / rows[t, n].norm() / rows[t - 1, n].norm())
        for t in range(1, 8)
        for n in range(35)
    }
    wanted = [*range(35), *sorted(changed, key=lambda token: -changed[token])[: 70 - 35]]
    assert load("evs", retention=0.25).compress(video).indices.tolist() == sorted(wanted)


def test_evs_drops_a_frame_in_which_nothing_changes():
    video = make_video(GRID)
    rows = video.embeds.reshape(8, 35, -1).clone()
    rows[4] = rows[3]
    frames = load("evs", retention=0.5).compress(replace(video, embeds=rows.flatten(0, 1))).indices // 35
    assert 4 not in frames.tolist() and {3, 5} < set(frames.tolist())


def test_evs_says_what_it_can_keep():
    video = make_video(GRID)
    with pytest.raises(BudgetError, match=r"first frame stays whole, 35 of 280 .* from 0\.125 to 1"):
        load("evs", retention=0.1).compress(video)
    assert load("evs", retention=0.125).compress(video).num_kept == 35
    official = load("evs", retention=0.1, variant="official").compress(video)
    assert official.indices.tolist() == list(range(35)), "vLLM keeps the first frame where less was asked for"


def test_evs_official_takes_the_floor_in_floating_point():
    video = make_video(TokenGrid(10, 10, 10))
    assert load("evs", retention=0.1, variant="official").compress(video).num_kept == 100
    assert load("evs", retention=0.2, variant="official").compress(video).num_kept == math.floor(1000 * (1 - (1 - 0.2)))
    assert load("evs", retention=0.2).compress(video).num_kept == 200


def test_positions_of_two_media_follow_each_other():
    from replays.evs import media_positions, recomputed_positions

    first, second = media_positions(TokenGrid(2, 1, 3), 2, 1)[[0, 1, 5]], media_positions(TokenGrid(1, 2, 2), 2, 1)
    ids = torch.tensor([1, 2, 9, 9, 9, 3, 4, 9, 9, 9, 9, 5])
    positions, delta = recomputed_positions(ids, [first, second], [9])
    assert positions[0].tolist() == [0, 1, 2, 2, 4, 5, 6, 7, 7, 7, 7, 9], "one grid width behind each medium"
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9] and delta == 10 - 12


# -- VidCom² ------------------------------------------------------------------------------------------------


def brute_vidcom2(rows: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Return likeness (T, n) and shares (T,) of tokens (T, n, D), from the definition in double precision."""
    quiet = np.argsort(rows.reshape(-1, rows.shape[2]).var(0), kind="stable")[: rows.shape[2] // 2]
    unit = rows[:, :, quiet] / np.linalg.norm(rows[:, :, quiet], axis=2, keepdims=True)
    video, frame = unit.mean((0, 1)), unit.mean(1)

    def gaussians(token: np.ndarray, centre: np.ndarray) -> float:
        return sum(math.exp(-float(((token - centre) ** 2).sum()) / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    to_video = np.array([[gaussians(token, video) for token in row] for row in unit])
    to_frame = np.array([[gaussians(token, frame[t]) for token in row] for t, row in enumerate(unit)])
    weights = np.exp((to_video.mean(1).min() - to_video.mean(1)) / 0.01)
    weights /= weights.sum()
    return to_video + to_frame, np.minimum(ratio * (1 + weights - weights.mean()), 1)


def test_vidcom2_official_equals_its_definition():
    video = make_video(GRID, seed=3)
    alike, shares = brute_vidcom2(video.embeds.double().reshape(8, 35, -1).numpy(), 0.25)
    wanted = [
        t * 35 + int(n) for t in range(8) for n in np.argsort(alike[t], kind="stable")[: max(1, round(shares[t] * 35))]
    ]
    chosen = load("vidcom2", retention=0.25, variant="official").compress(video)
    assert chosen.indices.tolist() == sorted(wanted)


@pytest.mark.parametrize("change", [-9, 0, 9])
def test_vidcom2_mends_the_count_by_likeness(change):
    from vidsieve.compressors.vidcom2 import corrected

    alike = torch.rand(8, 35, generator=torch.Generator().manual_seed(2))
    released = torch.randperm(280, generator=torch.Generator().manual_seed(3))[:70].sort().values
    order = sorted(range(280), key=lambda token: float(alike.flatten()[token]))
    inside = [token for token in order if token in set(released.tolist())]
    outside = [token for token in order if token not in set(inside)]
    wanted = inside[: 70 + change] + outside[: max(0, change)]
    assert corrected(alike, released, 70 + change).tolist() == sorted(wanted)


def test_vidcom2_gives_an_odd_frame_more():
    video = make_video(GRID)
    rows = video.embeds.reshape(8, 35, -1).clone()
    rows[:] = rows[0]
    rows[5] = torch.randn(35, rows.shape[2], generator=torch.Generator().manual_seed(1))
    chosen = load("vidcom2", retention=0.2).compress(replace(video, embeds=rows.flatten(0, 1)))
    counts = torch.bincount(chosen.indices // 35, minlength=8)
    assert int(counts.argmax()) == 5 and int(counts[5]) >= 10 and int(counts.sum()) == 56


# -- VisionZip ----------------------------------------------------------------------------------------------


def test_visionzip_sums_in_full_precision():
    """In bfloat16 a sum of ones stops at 256."""
    embeds = torch.ones(601, 4, dtype=torch.bfloat16)
    owner = torch.zeros(601, dtype=torch.int64)
    owner[0] = -1
    for doubled, wanted in ((False, 1), (True, 2)):
        merged = merge(embeds, torch.tensor([0]), owner, doubled)
        assert merged.dtype == torch.bfloat16 and torch.equal(merged, torch.full((1, 4), wanted, dtype=torch.bfloat16))


def test_visionzip_merges_to_means():
    """Of eight tokens 0 and 1 are dominant; 3 and 7 have the key of 2, 4 and 6 that of 5."""
    grid, embeds = TokenGrid(1, 2, 4), torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128])[:, None]
    keys = torch.eye(3)[[2, 2, 0, 0, 1, 1, 1, 0]]
    encoder = EncoderOutputs(torch.tensor([0.9, 0.8, 0.1, 0.2, 0.1, 0.0, 0.2, 0.1]), keys)
    video = VideoTokens(embeds, grid, torch.arange(8)[None], encoder=encoder)
    for variant, first, second in (
        ("ours", (4 + 8 + 128) / 3, (32 + 16 + 64) / 3),
        ("official", 4 + (8 + 128) / 2, 32 + (16 + 64) / 2),
    ):
        chosen = load("visionzip", retention=Tokens(4), contextual=0.5, variant=variant).compress(video)
        assert chosen.indices.tolist() == [0, 1, 2, 5]
        assert chosen.embeds.flatten().tolist() == pytest.approx([1, 2, first, second])


# -- FastVID ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    size=st.integers(1, 12),
    part=st.integers(1, 100),
    context=st.sampled_from([0.0, 0.4, 0.9]),
    stride=st.integers(1, 5),
)
def test_fastvid_shares_add_up_to_the_budget(lengths, size, part, context, stride):
    from vidsieve.compressors.fastvid import anchor_frames, exact_plan

    edges = np.cumsum([0, *lengths]).tolist()
    spans, total = list(pairwise(edges)), edges[-1] * size
    budget = max(1, total * part // 100)
    plan = exact_plan(spans, budget, size, context, stride)
    assert [len(shares) for shares in plan] == lengths
    assert sum(salient + anchors for shares in plan for salient, anchors in shares) == budget
    for length, shares in zip(lengths, plan, strict=True):
        assert all(salient >= 0 <= anchors and salient + anchors <= size for salient, anchors in shares)
        assert {t for t, (_, anchors) in enumerate(shares) if anchors} <= set(anchor_frames(length, stride))
        assert length - 1 in anchor_frames(length, stride)


def test_fastvid_ours_spends_as_the_second_release_where_nothing_is_lost():
    from vidsieve.compressors.fastvid import FastVID, exact_plan, official_plan

    spans = [(0, 3), (3, 4), (4, 16)]
    released = official_plan(FastVID(0.25, "official", form="llava_video"), spans, torch.ones(15), 36, 9)
    assert exact_plan(spans, 16 * 9, 36, 0.4, 4) == released


def test_fastvid_cuts_where_frames_differ():
    from vidsieve.compressors.fastvid import cut

    alike = torch.tensor([0.99, 0.2, 0.98, 0.97, 0.5, 0.95])
    assert cut(alike, 1, 0.9) == [(0, 2), (2, 5), (5, 7)]
    assert cut(alike, 4, 0.9) == [(0, 2), (2, 5), (5, 6), (6, 7)], "the least alike of the others as well"
    assert cut(torch.ones(0), 8, 0.9) == [(0, 1)]


def test_fastvid_keeps_salient_tokens_and_merges_what_repeats_into_anchors():
    grid = TokenGrid(4, 2, 4)
    draw = torch.Generator().manual_seed(0)
    kinds = torch.nn.functional.normalize(torch.randn(3, 32, generator=draw), dim=-1) * 5
    which = torch.randint(0, 2, (4, 8), generator=draw)
    tokens = kinds[which] + 0.01 * torch.randn(4, 8, 32, generator=draw)
    tokens[1, 5] = kinds[2]
    saliency = torch.zeros(4, 8)
    saliency[1, 5] = saliency[0, 0] = saliency[2, 0] = saliency[3, 0] = 1.0
    video = make_video(grid)
    video = replace(video, embeds=tokens.flatten(0, 1), encoder=replace(video.encoder, attention=saliency.flatten()))
    chosen = load("fastvid", retention=Tokens(6), segments=1, threshold=-1.0).compress(video)
    assert chosen.indices.tolist()[:3] == [0, 13, 16] and {int(i) // 8 for i in chosen.indices[3:]} == {3}
    assert torch.equal(chosen.embeds[1], tokens[1, 5]), "salient tokens stay as they are"
    anchors = [int(i) for i in chosen.indices[3:] if int(i) != 24]
    assert {int(which[3, i - 24]) for i in anchors} == {0, 1}, "one anchor of each kind"
    for place in anchors:
        kind = int(which[3, place - 24])
        own = chosen.embeds[chosen.indices.tolist().index(place)]
        others = torch.stack(
            [
                tokens[t, n]
                for t in range(4)
                for n in range(8)
                if which[t, n] == kind and not saliency[t, n] and (t, n) != (3, place - 24)
            ]
        )
        assert torch.allclose(own, 0.6 * tokens[3, place - 24] + 0.4 * others.mean(0), atol=1e-5)


# -- HoliTom and PruneVID -----------------------------------------------------------------------------------


def brute_windows(same: np.ndarray) -> int:
    """Return how many tokens vanish under the best cut into windows, by trying every one."""
    frames = len(same) + 1

    def best(start: int) -> int:
        if start == frames:
            return 0
        found = best(start + 1)
        for stop in range(start + 2, frames + 1):
            found = max(found, (stop - start - 1) * int(same[start : stop - 1].all(0).sum()) + best(stop))
        return found

    return best(0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 8), likely=st.floats(0.1, 0.95))
def test_holitoms_windows_are_the_best_there_are(seed, frames, likely):
    from vidsieve.compressors.holitom import windows

    same = np.random.default_rng(seed).random((frames - 1, 5)) < likely
    found, reduced = windows(torch.from_numpy(same), 1024)
    assert reduced == brute_windows(same)
    assert [frame for first, last in found for frame in range(first, last + 1)] == list(range(frames))
    gained = sum((b - a) * int(same[a:b].all(0).sum()) for a, b in found if b > a)
    assert gained == reduced
    assert all(b - a < 3 for a, b in windows(torch.from_numpy(same), 3)[0])


def test_holitom_merges_a_place_that_does_not_change_into_its_first_frame():
    video = make_video(TokenGrid(4, 2, 4))
    rows = video.embeds.reshape(4, 8, -1).clone()
    rows[:, 3] = rows[0, 3] * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]  # one direction: cosine 1
    video = replace(video, embeds=rows.flatten(0, 1))
    chosen = load("holitom", retention=1 - 3 / 32, threshold=0.9999, inner=False).compress(video)
    assert sorted(set(range(32)) - set(chosen.indices.tolist())) == [11, 19, 27]
    assert torch.allclose(chosen.embeds[3], rows[0, 3] * 2.5)
    assert torch.equal(chosen.embeds[4], rows[0, 4])


def test_prunevid_calls_still_what_is_alike_in_all_pairs_of_frames():
    from vidsieve.compressors.prunevid import likeness, split

    frames = make_video(TokenGrid(6, 3, 3), seed=2).embeds.reshape(6, 9, -1).double()
    spans = [(0, 4), (4, 5), (5, 6)]
    unit = frames / frames.norm(dim=-1, keepdim=True)
    pairs = [unit[a] @ unit[b].T for a in range(4) for b in range(4) if a != b]
    alike = torch.stack([pair.diagonal() for pair in pairs]).mean(0)
    threshold = float(alike.sort().values[4:6].mean())
    still = (alike > threshold).nonzero().flatten().tolist()
    parts = split(frames.float(), spans, threshold)
    assert parts[0].places.tolist() == still and parts[0].length == 4
    assert torch.allclose(parts[0].tokens.double(), frames[:4, still].mean(0), atol=1e-6)
    assert [len(part.places) for part in parts[1:]] == [9 - len(still)] * 4 + [9, 9], (
        "a frame alone does not stand still"
    )
    mean = unit[:4].mean(0)
    wanted = (unit[:4] * (mean / mean.norm(dim=-1, keepdim=True))).sum(-1)
    found = likeness(frames.float(), spans)
    assert torch.allclose(found[:4].double(), wanted, atol=1e-6) and torch.allclose(found[4:], torch.ones(2, 9))


def test_prunevids_release_rounds_down_in_every_set():
    from vidsieve.compressors.prunevid import official_choice, official_count

    assert [official_count(size, 0.5) for size in (14, 15, 16, 40)] == [14, 7, 8, 20]
    scores = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.8, 0.3, 0.7])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert official_choice(scores, groups, 0.6).tolist() == [1, 4, 6], "⌊1.8⌋ and ⌊2.4⌋, best first"


# -- FlashVID -----------------------------------------------------------------------------------------------


def recorded_flashvid(case, variant="official", **changed):
    """Return a recorded video, and the method with its settings before the LLM."""
    import json
    from pathlib import Path

    from replays.flashvid import method_of

    archive = np.load(Path(__file__).parent / "oracles" / "flashvid.npz")
    frames, attention = (torch.from_numpy(archive[f"{case}/{key}"]) for key in ("x", "attn"))
    grid = TokenGrid(len(frames), *archive[f"{case}/grid"].tolist())
    video = VideoTokens(
        frames.flatten(0, 1),
        grid,
        torch.arange(grid.num_tokens)[None],
        encoder=EncoderOutputs(attention.flatten()),
    )
    return video, replace(method_of(json.loads(str(archive[f"{case}/cfg"]))), variant=variant, **changed)


def brute_picks(rows, attention, spans, count, *, relevance, again):
    """Return the picks of every frame in double precision, by reading all distances to all earlier picks."""
    rows, found = rows.double(), []
    for start, stop in spans:
        event = rows[start:stop].mean(1)
        for t in range(start, stop):
            unit = rows[t] / rows[t].norm(dim=-1, keepdim=True)
            distance = (1 - unit @ unit.T) * attention[t].double()
            if relevance:
                distance = distance * torch.stack([(x * event).sum(-1).mean() for x in rows[t]])
            picks = [int(distance.sort(0).values[1].argmax())]
            while len(picks) < count:
                nearest = distance[picks].amin(0)
                if not again:
                    nearest[picks] = -torch.inf
                picks.append(int(nearest.argmax()))
            found.append(picks)
    return found


@pytest.mark.parametrize("relevance", [False, True])
def test_flashvid_picks_what_is_farthest_by_weighted_cosine(relevance):
    from vidsieve.compressors.flashvid import distinct_picks, relevances

    video, spans = make_video(GRID, seed=5), [(0, 3), (3, 4), (4, 8)]
    rows, attention = video.embeds.reshape(8, 35, -1) + 0.5, video.encoder.attention.reshape(8, 35)
    event = relevances(rows, rows.mean(1), spans) if relevance else None
    picks = distinct_picks(rows, attention, event, 12)
    assert picks.tolist() == brute_picks(rows, attention, spans, 12, relevance=relevance, again=False)
    assert picks.tolist() == distinct_picks(rows, attention, event, 35)[:, :12].tolist(), "fewer are the first of more"


def test_flashvids_release_picks_a_token_again():
    """Where all but one have a negative relevance, as features about a centre can; or only equal ones are left."""
    from vidsieve.compressors.flashvid import distinct_picks, relevances

    video = make_video(GRID, seed=5)
    rows, attention = video.embeds.reshape(8, 35, -1), video.encoder.attention.reshape(8, 35)
    spans = [(0, 4), (4, 8)]
    centred = rows.clone()
    centred[..., 0] = -10.0
    centred[:, 4, 0] = 1000.0
    equal = torch.cat([rows[:, :5]] * 7, 1)
    for features in (centred, equal):
        event = relevances(features, features.mean(1), spans)
        released = distinct_picks(features, attention, event, 12, again=True, exact=True)
        ours = distinct_picks(features, attention, event, 12)
        assert min(len(set(picks)) for picks in released.tolist()) < 12
        assert all(len(set(picks)) == 12 for picks in ours.tolist())
        first = distinct_picks(features, attention, None, 12, exact=True)
        assert all(len(set(picks)) == 12 for picks in first.tolist()), "the release's first form does not"
    for picks in ours.tolist():
        assert len({place % 5 for place in picks[:5]}) == 5, "different tokens come before equal ones"
        assert picks[5:] == sorted(set(range(35)) - set(picks[:5]))[:7], "the lowest first"
    kept = {}
    for variant in ("official", "ours"):
        method = load("flashvid", retention=0.2, variant=variant, inner=False, alpha=1.0, segments=1, expansion=1.0)
        kept[variant] = method.compress(replace(video, embeds=equal.flatten(0, 1))).num_kept
    assert kept["official"] < kept["ours"] == 56


@pytest.mark.parametrize("variant", ["ours", "official"])
def test_flashvid_merges_a_tree_into_its_root(variant):
    """A chain of norms 1 to 4 is 2.5 on average; the release divides its sum by the two of the root's link."""
    from vidsieve.compressors.flashvid import merged_trees

    line = torch.zeros(4, 3, 4)
    line[:, 0, 0] = torch.tensor([1.0, 2, 3, 4])  # one kind of token that stays
    line[:, 1, 1] = torch.tensor([1.0, 9, 9, 9])
    line[1, 1], line[:, 2, 2] = torch.tensor([5.0, 0, 0, 0]), 7.0  # and for a frame there are two of the kind
    free = torch.ones(4, 3, dtype=torch.bool)
    free[:, 2] = False
    places, tokens = merged_trees(line, free, 0.8, 4, variant == "official")
    assert places.tolist() == [0, 1, 7]
    chain = (1 + 2 + 3 + 4 + 5) / (3 if variant == "official" else 5)
    assert tokens[:, 0].tolist() == pytest.approx([chain, 0, 0])
    assert tokens[:, 1].tolist() == pytest.approx([0, 1, 9]), "a star is averaged by both"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), release=st.booleans(), least=st.integers(0, 30))
def test_flashvids_trees_equal_sums_passed_back_frame_by_frame(seed, release, least):
    from vidsieve.compressors.flashvid import links, merged_trees

    draw = torch.Generator().manual_seed(seed)
    frames, free = torch.randn(6, 5, 3, generator=draw), torch.rand(6, 5, generator=draw) < 0.8
    linked, parent = links(frames, free, 0.6, least, release)
    unit = torch.nn.functional.normalize(frames, dim=-1)
    for t, n in linked.nonzero().tolist():
        others = unit[t - 1] @ unit[t, n]
        assert free[t, n] and free[t - 1, parent[t, n]] and float(others[parent[t, n]]) > 0.6
        assert float(others[parent[t, n]]) == pytest.approx(float(others[free[t - 1]].max()))
    loose, _ = links(frames, free, 0.6, 0, release)
    most = 30 - least
    if int(loose.sum()) > most:
        assert int(linked.sum()) == (max(0, most - 1) if release else most)
    else:
        assert torch.equal(linked, loose)
    total, count = frames.clone(), torch.ones(6, 5, 1)
    for t in range(5, 0, -1):
        for n in linked[t].nonzero().flatten().tolist():
            total[t - 1, parent[t, n]] += total[t, n]
            count[t - 1, parent[t, n]] += 1 if release else count[t, n]
    places, tokens = merged_trees(frames, free, 0.6, least, release)
    assert places.tolist() == (free & ~linked).flatten().nonzero().flatten().tolist()
    assert torch.allclose(tokens, (total / count).flatten(0, 1)[places], atol=1e-5)


def test_flashvids_release_may_pick_a_token_and_merge_others_into_it():
    from vidsieve.compressors.flashvid import distinct_picks, merged_segments

    video, method = recorded_flashvid("c2_dups")
    rows, attention = video.embeds.reshape(9, 49, -1), video.encoder.attention.reshape(9, 49)
    picks = distinct_picks(rows, attention, None, 12)
    alone = [(t, t + 1) for t in range(9)]
    for release in (True, False):
        indices, _ = merged_segments(rows, picks, alone, [(12, 4)] * 9, 0.8, release)
        assert len(indices) == 9 * 16
        assert (len(set(indices.tolist())) < 9 * 16) == release
    released, count = method.compress(video), 9 * 16
    assert released.num_kept < count, "an index that occurs twice is kept once"
    ours = replace(method, variant="ours", retention=Tokens(count)).compress(video)
    assert ours.num_kept == count


def test_flashvids_release_keeps_up_to_a_token_more_in_every_frame():
    video, method = recorded_flashvid("c0_ov")
    assert method.compress(video).num_kept == 199, "12 times 16 of 49, rounded up three times"
    assert replace(method, variant="ours").compress(video).num_kept == math.floor(0.25 * 588) == 147


def test_flashvid_ours_merges_into_what_most_tokens_are_like():
    """One neighbour, as the release has it for one cluster, is the token itself: every density is then the same."""
    from vidsieve.compressors.flashvid import clustered

    tokens = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    tokens[5:] = tokens[8] + 0.05 * tokens[5:]
    chosen, means = clustered(tokens, 1, 7)
    assert int(chosen) >= 5 and torch.allclose(means[0], tokens.mean(0), atol=1e-6)
    video = replace(make_video(TokenGrid(1, 3, 4), width=8), embeds=tokens)
    ours = load("flashvid", retention=Tokens(1), alpha=0.0, inner=False).compress(video)
    assert int(ours.indices) == int(chosen)
    official = load("flashvid", retention=1 / 12, variant="official", alpha=0.0, expansion=1.0, inner=False)
    assert official.compress(video).indices.tolist() == [0], "without the release's noise the first token"


def test_flashvid_clusters_nothing_where_trees_meet_the_budget():
    from replays import noisy

    video = make_video(GRID, seed=5)
    rows = video.embeds.reshape(8, 35, -1)[:1].repeat(8, 1, 1)
    still = replace(video, embeds=rows.flatten(0, 1))
    method = load("flashvid", retention=0.5, segments=1, alpha=0.0, inner=False)
    with noisy([]):  # no density is asked for
        assert method.compress(still).num_kept == 140


def test_flashvid_cuts_below_its_threshold_and_adds_what_is_missing():
    from vidsieve.compressors.flashvid import cut

    alike = torch.tensor([0.99, 0.2, 0.98, 0.97, 0.5, 0.95])
    for release in (True, False):
        assert cut(alike, 1, 0.9, release) == cut(alike, 3, 0.9, release) == [(0, 2), (2, 5), (5, 7)]
        assert cut(alike, 4, 0.9, release) == [(0, 2), (2, 5), (5, 6), (6, 7)]
        assert cut(torch.ones(0), 8, 0.9, release) == [(0, 1)]
    few = torch.tensor([0.99, 0.2])
    assert cut(few, 8, 0.9, False) == [(0, 1), (1, 2), (2, 3)]
    assert cut(few, 8, 0.9, True) == [(0, 1), (1, 2), (2, 2), (2, 3)], "the release may cut at one place twice"
    above = torch.tensor([1 + 1e-6, 0.2])  # by rounding
    assert cut(above, 3, 0.9, False) == [(0, 1), (1, 2), (2, 3)] and cut(above, 3, 0.9, True)[0] == (0, 2)


def test_flashvid_drops_inside_what_the_last_token_attends_to_least():
    method = load("flashvid", retention=0.25)
    ((layer, kept),) = method.stages(28, 1000)
    assert (layer, kept) == (20, 300)
    assert float(method.outer(28).retention) == pytest.approx(0.25 * 1.25), "the release's expansion"
    official = load("flashvid", retention=0.25, variant="official")
    assert official.outer(28).retention == 0.25 and official.stages(28, 61) == ((20, 19),), "rounded up"
    assert official.stages(28, 10) == ((20, 3),) and load("flashvid").stages(28, 61) == ((20, 18),)
    rows = torch.rand(4, 1, 30, generator=torch.Generator().manual_seed(0))
    view = GivenView(20, 28, TokenGrid(1, 5, 6), torch.arange(30), rows={("last", 19): rows})
    choice = method.step(view, 9)
    assert choice.indices.tolist() == sorted(rows[:, 0].mean(0).topk(9).indices.tolist()) and choice.hidden is None


# -- FrameFusion --------------------------------------------------------------------------------------------


def test_framefusion_makes_chains_the_mean_of_their_members():
    video = make_video(TokenGrid(4, 1, 3))
    rows = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0))
    rows[1, 0], rows[2, 0] = 2 * rows[0, 0], 3 * rows[0, 0]  # a chain of three at place 0
    rows[3, 2] = 5 * rows[2, 2]  # one of two at place 2
    chosen = load("framefusion", retention=0.75, inner=False).compress(replace(video, embeds=rows.flatten(0, 1)))
    assert chosen.indices.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10]
    assert torch.allclose(chosen.embeds[0], 2 * rows[0, 0]) and torch.allclose(chosen.embeds[6], 3 * rows[2, 2])
    assert torch.equal(chosen.embeds[1], rows[0, 1])


@pytest.mark.parametrize("seen", [[], [0.8], [0.8, 0.7, 0.5]])
def test_framefusion_asks_for_what_makes_the_mean(seen):
    from fractions import Fraction

    from vidsieve.compressors.framefusion import excess

    shares = [Fraction(str(share)) for share in seen]
    over = excess(shares, Fraction(3, 10), 12)
    alive = (shares[-1] if shares else 1) * (1 - over)
    assert sum(shares) + (12 - len(shares)) * alive == Fraction(36, 10)
    with pytest.raises(BudgetError, match="first 4 of 12 layers have seen more"):
        excess([Fraction(1)] * 4, Fraction(3, 10), 12)
    assert excess([Fraction(1, 10)], Fraction(3, 10), 12) == 0


@pytest.mark.parametrize(("history", "times"), [((40,), 0), ((40, 40), 1)])
def test_framefusion_reads_attention_where_it_drops(history, times):
    """The step after one that merged a sixth merges; the one after a step that merged nothing drops."""
    draw, read = torch.Generator().manual_seed(3), []
    rows = {("last", len(history) - 1): lambda: read.append(1) or torch.rand(2, 1, 40)}
    tensors = {"hidden": torch.rand(40, 8, generator=draw)}
    view = GivenView(len(history), 8, TokenGrid(4, 3, 4), torch.arange(40), history, rows=rows, tensors=tensors)
    choice = load("framefusion", retention=0.5, threshold=0.1).step(view, 40)
    assert len(choice.indices) < 40 and len(read) == times and (choice.hidden is None) == bool(times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_along_time_are_torchs_bit_for_bit(dtype):
    frames = torch.randn(5, 7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    frames[2] = frames[1]
    frames[3, :2] = 0
    frames[4, 3] *= 1e-12
    wanted = torch.nn.functional.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    before = frames.clone()
    assert torch.equal(_clustering.along_time(frames), wanted) and torch.equal(frames, before)
    assert _clustering.along_time(frames[:1]).shape == (0, 7)


# -- SparseVLM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_distances_block_by_block_are_those_of_the_whole(monkeypatch, size):
    """Peaks and nearest centres, with blocks of any size; the whole matrix is a matter of memory alone."""
    tokens = torch.randn(size, 24, generator=torch.Generator().manual_seed(size))
    whole = _clustering.Distances.of(tokens)
    scores = _clustering.peak_scores(whole, 5)
    chosen = _clustering.centres(scores, min(size, 9))
    alike = torch.nn.functional.normalize(tokens, dim=-1) @ torch.nn.functional.normalize(tokens[chosen], dim=-1).T
    for block in (1, 24, 300, 10**6):
        monkeypatch.setattr(_clustering, "_WHOLE", 0)
        monkeypatch.setattr(_clustering, "_BLOCK", block)
        parts = _clustering.Distances.of(tokens)
        assert parts.whole is None
        assert torch.allclose(_clustering.peak_scores(parts, 5), scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(parts.nearest(chosen), whole.nearest(chosen))
        assert torch.equal(_clustering.most_alike(tokens, tokens[chosen]), alike.argmax(1))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 400), st.integers(4, 40), st.integers(1, 3), st.fractions(0, 1), st.data())
def test_stages_spend_a_budget_and_no_more(tokens, depth, steps, budget, data):
    """Against every factor that could be: shares in proportion, a token at least, all at most, within the budget."""
    layers = sorted(data.draw(st.sets(st.integers(1, depth - 1), min_size=steps, max_size=steps)))
    shares = sorted(data.draw(st.lists(st.fractions(1 / 64, 1), min_size=steps, max_size=steps)), reverse=True)
    floor = layers[0] * tokens + depth - layers[0]
    if budget * depth * tokens < floor:
        with pytest.raises(BudgetError, match="cannot go below"):
            scaled_counts(shares, layers, depth, tokens, budget, load("pyramiddrop"))
        return
    counts = scaled_counts(shares, layers, depth, tokens, budget, load("pyramiddrop"))
    spans = np.diff([*layers, depth]).tolist()

    def seen(kept):
        return layers[0] * tokens + sum(count * span for count, span in zip(kept, spans, strict=True))

    assert seen(counts) <= budget * depth * tokens and all(1 <= count <= tokens for count in counts)
    assert counts == sorted(counts, reverse=True)
    # A factor a little larger than the largest that fits, found by halving, does not fit before rounding down.
    low, high = Fraction(0), 2 * tokens / min(shares)
    for _ in range(60):
        middle = (low + high) / 2
        exact = [min(Fraction(tokens), max(Fraction(1), middle * share)) for share in shares]
        low, high = (middle, high) if seen(exact) <= budget * depth * tokens else (low, middle)
    best = [min(tokens, max(1, math.floor(low * share))) for share in shares]
    assert all(0 <= count - other <= 1 for count, other in zip(counts, best, strict=True))


def test_sparsevlm_keeps_the_releases_proportions():
    ours = load("sparsevlm", retention=(3 * 576 + 4 * 300 + 9 * 200 + 16 * 110) / 32 / 576).stages(32, 576)
    assert [at for at, _ in ours] == [3, 7, 16]
    assert all(abs(got - wanted) <= 1 for (_, got), wanted in zip(ours, (300, 200, 110), strict=True))
    released = load("sparsevlm", retention=1 / 3, variant="official")
    assert released.stages(32, 576) == ((3, 300), (7, 200), (16, 110))
    assert released.stages(32, 6272)[0] == (3, 300 * 6272 // 576)
    with pytest.raises(BudgetError, match=r"tables for retentions of 0\.333, 0\.222"):
        load("sparsevlm", retention=0.25, variant="official").stages(32, 576)
    with pytest.raises(BudgetError, match=r"below 0\.0954"):
        load("sparsevlm", retention=0.05).stages(32, 576)
    assert load("sparsevlm", retention=0.05, earliest=True).stages(32, 576)[0][0] == 1
    with pytest.raises(BudgetError, match="versions 1 and 2"):
        load("sparsevlm", version=3)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 400), part=st.integers(1, 99))
def test_sparsevlm_counts_its_clusters(count, part):
    from vidsieve.compressors.sparsevlm import SparseVLM, cluster_count, recycled_count

    keep = max(1, count * part // 100)
    best = SparseVLM()._best(count, keep)
    clusters = keep - best
    assert 0 <= best <= keep and clusters <= recycled_count(count - best)
    assert clusters == cluster_count(count - best) or best + 1 + cluster_count(count - best - 1) > keep


def test_sparsevlms_relevant_words_and_score():
    from vidsieve.compressors.sparsevlm import relevant_words

    draw = torch.Generator().manual_seed(0)
    video, text = torch.randn(12, 6, generator=draw), torch.randn(5, 6, generator=draw)
    words = relevant_words(video, text)
    shares = np.exp((video.double() @ text.double().T).numpy())
    shares = (shares / shares.sum(1, keepdims=True)).mean(0)
    assert words.tolist() == (shares > shares.mean()).tolist()
    attention, bias = torch.rand(20, 5, 12, generator=draw), 1 + torch.rand(5, 12, generator=draw)
    tensors = {"video": video, "text": text, "rope_bias": bias}
    view = GivenView(3, 32, TokenGrid(1, 3, 4), torch.arange(12), rows={("text", 2): attention}, tensors=tensors)
    divided = (attention / bias)[:, words]
    heads = divided.sum((1, 2)).argsort(descending=True)[:14]
    assert torch.allclose(load("sparsevlm", version=2).scores(view), divided[heads].mean((0, 1)), atol=1e-6)
    assert torch.allclose(load("sparsevlm").scores(view), attention[:, words].mean((0, 1)), atol=1e-6)


# -- TopV ---------------------------------------------------------------------------------------------------


def test_topvs_plan_ends_on_the_targets_side():
    from workbench.topv import sinkhorn

    draw = torch.Generator().manual_seed(0)
    cost = torch.rand(6, 5, generator=draw, dtype=torch.float64)
    mass, wanted = torch.rand(6, generator=draw).double().softmax(0), torch.rand(5, generator=draw).double().softmax(0)
    scaling = np.exp(-cost.numpy() / 0.1)
    u, v = np.ones(6), np.ones(5)
    for _ in range(3):
        u = mass.numpy() / (scaling @ v)
        v = wanted.numpy() / (scaling.T @ u)
    plan = sinkhorn(cost, mass, wanted, 0.1, 3)
    assert np.allclose(plan.numpy(), u[:, None] * scaling * v)
    assert torch.allclose(plan.sum(0), wanted) and not torch.allclose(plan.sum(1), mass, atol=1e-6)
    assert torch.allclose(sinkhorn(cost, mass, wanted, 0.1, 500).sum(1), mass)


def test_topv_keeps_what_carries_and_recovers_evenly(topv):
    grid, draw = TokenGrid(2, 4, 6), torch.Generator().manual_seed(0)
    before, after = torch.randn(48, 16, generator=draw), torch.randn(48, 16, generator=draw)
    method = load("topv", recovered=0.5)
    importance = method.importance(before, after, torch.arange(48), grid)
    assert torch.allclose(importance.reshape(2, 24).sum(1), torch.tensor([24.0, 24.0]), atol=1e-4)
    view = GivenView(3, 32, grid, torch.arange(48), tensors={"hidden": after, "before": before})
    chosen = set(method.step(view, 12).indices.tolist())
    best = set(importance.topk(6).indices.tolist())
    rest = [token for token in range(48) if token not in best]
    assert best < chosen and sorted(chosen - best) == [rest[7 * (i + 1) - 1] for i in range(6)]
    other = load("topv", recovered=0.5, feature=0.0, place=0.0).importance(before, after, torch.arange(48), grid)
    assert not torch.allclose(other, importance), "importance follows from the costs"
