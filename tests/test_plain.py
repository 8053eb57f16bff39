"""The plain forms that benchmarks measure against do what the official code did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from replays import groups, noise_pieces, same_indices, with_newlines

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plain.aot  # noqa: E402
import plain.divprune  # noqa: E402
import plain.dycoke  # noqa: E402
import plain.earlytom  # noqa: E402
import plain.evs  # noqa: E402
import plain.fastv  # noqa: E402
import plain.fastvid  # noqa: E402
import plain.flashvid  # noqa: E402
import plain.framefusion  # noqa: E402
import plain.holitom  # noqa: E402
import plain.prunevid  # noqa: E402
import plain.pyramiddrop  # noqa: E402
import plain.sparsevlm  # noqa: E402
import plain.vcast  # noqa: E402
import plain.vidcom2  # noqa: E402
import plain.visionzip  # noqa: E402
from plain._shared import eager_attention  # noqa: E402


class Recorded:
    """A method's file; `of(case, key)` is a tensor."""

    def __init__(self, name):
        self.archive = np.load(ROOT / "tests" / "oracles" / f"{name}.npz", allow_pickle=False)

    def of(self, case, key):
        return torch.from_numpy(np.asarray(self.archive[f"{case}/{key}"]))

    def cases(self, depth, key):
        found = [case for case in groups(self.archive, depth) if f"{case}/{key}" in self.archive]
        assert found
        return found


def close(ours, theirs):
    return torch.allclose(torch.as_tensor(ours).float(), torch.as_tensor(theirs).float(), atol=1e-4)


def test_divprune():
    recorded, equal = Recorded("divprune"), 0
    for case in recorded.cases(2, "selected_in_order"):
        x, wanted = recorded.of(case, "x"), recorded.of(case, "selected_in_order")
        equal += same_indices(plain.divprune.picks(x, len(wanted)), wanted) == 0
    assert equal >= 3  # exact duplicates follow rounding


def test_visionzip():
    recorded = Recorded("visionzip")
    for case in recorded.cases(2, "cls_attn_rows"):
        dominant, contextual = (int(recorded.of(case, key)) for key in ("dominant_excl_cls", "contextual"))
        best, made = plain.visionzip.select(
            recorded.of(case, "cls_attn_rows"),
            recorded.of(case, "metric"),
            recorded.of(case, "hidden"),
            dominant,
            contextual,
        )
        assert torch.equal(best.sort(1).values, recorded.of(case, "all_indices").sort(1).values)
        assert close(made, recorded.of(case, "output"))


def test_fastv():
    recorded, equal = Recorded("fastv"), 0
    for case in recorded.cases(2, "attn_last_row"):
        row, keep = recorded.of(case, "attn_last_row"), int(recorded.of(case, "n_keep_img"))
        whole = torch.zeros(*row.shape, row.shape[-1])
        whole[:, -1] = row
        start, length = int(recorded.of(case, "sys_len")), int(recorded.of(case, "img_len"))
        kept = plain.fastv.select(whole, start, length, keep)
        equal += same_indices(kept, recorded.of(case, "keep_indexs")) == 0
    assert equal >= 3  # ties follow the release's sort


def test_sparsevlm():
    recorded = Recorded("sparsevlm")
    for case in recorded.cases(2, "attn_rows_raters"):
        rows, (start, length) = recorded.of(case, "attn_rows_raters"), recorded.of(case, "pre_img").tolist()
        scores, kept = plain.sparsevlm.select(
            rows, start, length, torch.arange(rows.shape[1]), int(recorded.of(case, "budget"))
        )
        assert close(scores, recorded.of(case, "score")) and torch.equal(kept, recorded.of(case, "kept").long())
    close_ones = [
        close(plain.sparsevlm.clusters(recorded.of(case, "x"), int(recorded.of(case, "K"))), recorded.of(case, "out"))
        for case in recorded.cases(2, "K")
    ]
    assert sum(close_ones) >= len(close_ones) - 1  # equal tokens follow rounding


def test_sparsevlms_raters():
    recorded = Recorded("sparsevlm")
    cases = recorded.cases(3, "raters_rel_to_text")
    assert cases
    for case in cases:
        name = case.split("/")[-1]
        start, length, _ = recorded.of(f"model/{name}", "pre_img_post").tolist()
        embeds = recorded.of(f"model/{name}", "inputs_embeds")
        found = plain.sparsevlm.raters(embeds[start : start + length], embeds[start + length :])
        assert torch.equal(found, recorded.of(case, "raters_rel_to_text").long())


def test_pyramiddrop():
    """Its rows are not recorded apart: against the definition, on whole causal attention."""
    query, key = torch.randn(2, 4, 50, 16).unbind(0)
    wanted = eager_attention(query, key).mean(0)[-1, 3:43].topk(10).indices.sort().values
    assert torch.equal(plain.pyramiddrop.select(query, key, 3, 40, 10), wanted)


def test_vidcom2():
    recorded, cases = Recorded("vidcom2"), 0
    for case in recorded.cases(1, "keep_idx"):
        if "vid" in str(recorded.archive[f"{case}/model"]):
            continue  # with newlines
        frames = recorded.of(case, "x").reshape(int(recorded.of(case, "T")), int(recorded.of(case, "tpf")), -1)
        kept = plain.vidcom2.select(frames, float(recorded.of(case, "ratio")))
        assert torch.equal(kept, recorded.of(case, "keep_idx").long())
        cases += 1
    assert cases


def test_vcast():
    recorded = Recorded("vcast")
    for case in recorded.cases(1, "keep_idx"):
        frames, wanted = recorded.of(case, "x"), recorded.of(case, "keep_idx").long()
        kept = plain.vcast.select(frames, float(recorded.of(case, "ratio")), int(recorded.of(case, "min_k")))
        size = frames.shape[1]
        assert torch.equal(torch.bincount(kept // size), torch.bincount(wanted // size))
        scores = recorded.of(case, "score").flatten()  # each token of one case occurs twice
        assert close(scores[kept].sort().values, scores[wanted].sort().values)


def test_evs():
    recorded = Recorded("evs")
    for case in recorded.cases(1, "mask"):
        frames = int(recorded.of(case, "thw")[0])
        x = recorded.of(case, "x")
        kept = plain.evs.select(x.reshape(frames, -1, x.shape[-1]), int(recorded.of(case, "count")))
        assert torch.equal(kept, recorded.of(case, "keep_idx").long())


def test_fastvid():
    recorded, cases = Recorded("fastvid"), 0
    for case in recorded.cases(1, "keep_idx_seq"):
        settings = json.loads(str(recorded.archive[f"{case}/cfg"]))
        if not case.startswith("vid") or settings["DySeg_c"] != plain.fastvid.SEGMENTS:
            continue
        before, after = recorded.of(case, "text_before"), recorded.of(case, "text_after")
        kept, made = plain.fastvid.select(
            recorded.of(case, "x"),
            recorded.of(case, "frame_global"),
            recorded.of(case, "saliency"),
            settings["retention_ratio"],
            iter(noise_pieces(recorded.archive, case)),
        )
        if f"{case}/newline" in recorded.archive:
            kept, made = with_newlines(kept, made, recorded.of(case, "newline"), int(recorded.of(case, "grid")[1]))
        theirs = recorded.of(case, "keep_idx_seq").long()
        assert torch.equal(kept + len(before), theirs[len(before) : len(before) + len(kept)])
        assert close(torch.cat([before, made, after]), recorded.of(case, "out_seq"))
        cases += 1
    assert cases


def test_holitom():
    recorded, cases = Recorded("holitom"), 0
    for case in recorded.cases(1, "token_rows"):
        frames, size = recorded.of(case, "x"), recorded.of(case, "x").shape[1]
        kept, made = plain.holitom.select(
            frames,
            recorded.of(case, "attn").reshape(frames.shape[:2]),
            float(recorded.of(case, "ratio")),
            float(recorded.of(case, "tau")),
            int(recorded.of(case, "max_window")),
            int(recorded.of(case, "K")),
            float(recorded.of(case, "Beta")),
            iter(noise_pieces(recorded.archive, case)),
        )
        rows = recorded.of(case, "token_rows").long()
        theirs = rows[:, 2] * size + rows[:, 3]
        assert torch.equal(kept.sort().values, theirs.sort().values)
        if str(recorded.archive[f"{case}/newline_mode"]) != "grid":
            assert close(made, recorded.of(case, "out"))
        cases += 1
    assert cases
    for case in recorded.cases(1, "hidden_in"):
        hidden, row = recorded.of(case, "hidden_in")[0], recorded.of(case, "attn_last_row_headmean")
        start, length = int(recorded.of(case, "start")), int(recorded.of(case, "length"))
        wanted = recorded.of(case, "keep_idx").long()
        keep = len(recorded.of(case, "top_idx_unsorted"))
        best, made = plain.holitom.inside(hidden[start : start + length], row[start : start + length], keep)
        assert torch.equal(best + start, wanted[(wanted >= start) & (wanted < start + length)])
        assert close(made, recorded.of(case, "hidden_out")[0][start : start + keep])


def test_flashvid():
    recorded = Recorded("flashvid")
    for case in recorded.cases(1, "out_idx"):
        settings = json.loads(str(recorded.archive[f"{case}/cfg"]))
        assert settings["expansion"] == 1.25
        kept, made = plain.flashvid.select(
            recorded.of(case, "x"),
            recorded.of(case, "attn"),
            settings["retention_ratio"],
            settings["alpha"],
            settings["temporal_threshold"],
            settings["min_segment_num"] if settings["do_segment"] else 1,
            settings["segment_threshold"] if settings["do_segment"] else -2.0,
            settings["token_selection_method"] == "attn_div_v2",
            iter(noise_pieces(recorded.archive, case)),
        )
        theirs, out = recorded.of(case, "out_idx").long(), recorded.of(case, "out")
        assert torch.equal(kept.sort().values, theirs)
        ours, wanted = (
            np.lexsort((rows[:, 0].numpy(), places.numpy())).tolist() for rows, places in ((made, kept), (out, theirs))
        )  # of an index that occurs twice the order is undefined
        assert close(made[ours], out[wanted])


def test_aot():
    recorded = Recorded("aot")
    for case in recorded.cases(1, "deep"):
        shallow, deep = recorded.of(case, "shallow"), recorded.of(case, "deep")
        count, share = int(recorded.of(case, "visual_token_num")), float(recorded.of(case, "global_ratio"))
        local, rest = plain.aot.anchors(shallow, deep, round(shallow.shape[1] ** 0.5), count, share)
        assert torch.equal(local.sort(1).values, recorded.of(case, "local_idx").long().sort(1).values)
        assert torch.equal(rest.sort(1).values, recorded.of(case, "global_idx").long().sort(1).values)
    for case in recorded.cases(1, "out_kept"):
        frames, mask = recorded.of(case, "x"), recorded.of(case, "mask").bool()
        made = plain.aot.within(frames, mask, round(frames.shape[1] ** 0.5))
        assert close(made, recorded.of(case, "out_kept"))
    for case in recorded.cases(1, "segments"):
        frames, mask, rows = recorded.of(case, "x"), recorded.of(case, "mask").bool(), []
        keep, scaling = float(recorded.of(case, "keep_ratio")), float(recorded.of(case, "scaling"))
        kept = mask.clone()
        for start, count in recorded.of(case, "segments").tolist():
            clip = [frames[t][mask[t]] for t in range(start, start + count)]
            made, stays = plain.aot.along(clip, keep, scaling)
            rows += made
            for t, own in enumerate(stays, start + 1):
                kept[t, mask[t].nonzero().flatten()[~own]] = False
        assert torch.equal(kept, recorded.of(case, "kept").bool())
        assert close(torch.cat(rows), recorded.of(case, "out"))


def test_earlytom():
    recorded = Recorded("earlytom")
    for case in recorded.cases(1, "out_attn"):
        frames = recorded.of(case, "x")
        settings = [float(recorded.of(case, "tau")), int(recorded.of(case, "max_window"))]
        newest, last = float(recorded.of(case, "ema")), bool(recorded.of(case, "last"))
        assert str(recorded.archive[f"{case}/mode"]) == "mixing"
        spans = plain.earlytom.segments(frames, *settings, newest)
        made, attention = plain.earlytom.merge(frames, recorded.of(case, "attn"), spans)
        assert close(made, recorded.of(case, "out")) and close(attention, recorded.of(case, "out_attn"))
        groups_ = plain.earlytom.segments(made, *settings, newest) if last else spans
        assert [list(group) for group in groups_] == recorded.of(case, "groups").tolist()
    for case in recorded.cases(1, "keep_idx"):
        groups_ = [tuple(group) for group in recorded.of(case, "groups").tolist()]
        kept = plain.earlytom.select(
            recorded.of(case, "attn"),
            groups_,
            float(recorded.of(case, "ratio")),
            int(recorded.of(case, "init_frames")),
        )
        assert torch.equal(kept, recorded.of(case, "keep_idx").long())


def test_dycoke():
    recorded = Recorded("dycoke")
    for case in recorded.cases(1, "keep_idx"):
        kept = plain.dycoke.select(recorded.of(case, "x"), float(recorded.of(case, "k")))
        assert torch.equal(kept.sort().values, recorded.of(case, "keep_idx").long().sort().values)


def test_prunevid():
    recorded = Recorded("prunevid")
    for case in recorded.cases(1, "features"):
        parts = plain.prunevid.select(
            recorded.of(case, "x"),
            float(recorded.of(case, "temporal_segment_ratio")),
            float(recorded.of(case, "tau")),
            float(recorded.of(case, "cluster_ratio")),
            iter(noise_pieces(recorded.archive, case)),
        )
        assert close(torch.cat(parts), recorded.of(case, "features"))
        attention = recorded.of(case, "text2img_attn")
        kept = plain.prunevid.inside(
            attention,
            0,
            attention.shape[-1],
            torch.arange(attention.shape[1]),
            [len(part) for part in parts],
            float(recorded.of(case, "alpha")),
        )
        assert same_indices(kept, recorded.of(case, "llm_keep_idx_unsorted")) == 0


def test_framefusion():
    recorded = Recorded("framefusion")
    for case in recorded.cases(1, "n_calls"):
        x = recorded.of(case, "x")
        start = len(recorded.of(case, "text_before"))
        patch = torch.arange(x.shape[1]).repeat(x.shape[0])
        _, alike = plain.framefusion.similarity(x.flatten(0, 1), patch)
        assert close(alike, recorded.of(case, "sim_by_patch0"))
        over = 1 - float(recorded.of(case, "cost"))
        kept, made = plain.framefusion.merge(x.flatten(0, 1), patch, float(recorded.of(case, "sim_lower")), over)
        theirs = recorded.of(case, "call0_kept").long()
        assert torch.equal(kept, theirs[(theirs >= start) & (theirs < start + x.shape[0] * x.shape[1])] - start)
        if f"{case}/call0_hidden" in recorded.archive:
            assert close(made, recorded.of(case, "call0_hidden")[start : start + len(kept)])
