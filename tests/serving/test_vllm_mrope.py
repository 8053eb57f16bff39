"""Positions and embeddings that the vLLM plug-in makes for Qwen's models, without vLLM: those of `vidsieve.prune`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.errors import UnsupportedCallError
from vidsieve.retention import parse_retention
from vidsieve.serving.vllm.failures import KEY_BYTES
from vidsieve.serving.vllm.positions import RATE, CarriesPositions, UnprunedVideo, read, written
from vidsieve.serving.vllm.shared import COUNT, PROMPT, REPORT_KEY, check_engine
from vidsieve.testing.tiny_models import FAMILIES, IMAGE, VIDEO, inputs_for
from vidsieve.types import TokenGrid

GRIDS = [TokenGrid(3, 2, 4), TokenGrid(4, 6, 2)]  # wide, and tall


class Theirs:
    """What the plug-in calls of vLLM's model."""

    def __init__(self, *, vllm_config, prefix=""):
        self.config = vllm_config.model_config.hf_config
        self.language_model = vllm_config.language_model


class Served(CarriesPositions, Theirs):
    def unpruned(self, thw, seconds, timestamps):
        grid = self.grid(thw)
        placed = {"video_grid_thw": torch.tensor([list(thw)])}
        if seconds is not None:
            placed["second_per_grid_ts"] = torch.tensor([seconds])
        if timestamps is None:
            return UnprunedVideo(grid, torch.full((grid.num_tokens,), VIDEO), placed)
        ids = [i for time in timestamps for i in (int(time), 118, *[VIDEO] * grid.per_frame, 119)]
        return UnprunedVideo(grid, torch.tensor(ids), placed)


def served(model, **settings):
    model.config.vidsieve = {"method": "divprune", "retention": 0.5} | settings
    rate = SimpleNamespace(video_pruning_rate=None)
    compiled = SimpleNamespace(cudagraph_mm_encoder=False)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=model.config, multimodal_config=rate),
        compilation_config=compiled,
        language_model=SimpleNamespace(embed_input_ids=model.get_input_embeddings()),
    )
    made = type("Served", (Served,), {"transformers_class": type(model).__name__})(vllm_config=config)
    assert rate.video_pruning_rate == RATE
    return made


def carried(count):
    key = torch.zeros(1, KEY_BYTES, dtype=torch.uint8)
    return {COUNT: torch.tensor([count]), PROMPT: torch.empty(1, 0, dtype=torch.int64), REPORT_KEY: key}


class Request:
    """One prompt with two videos and an image on its way through vLLM, and the same under transformers."""

    @torch.no_grad()
    def __init__(self, family, retention):
        model = FAMILIES[family]()
        inputs = inputs_for(family, [GRIDS], image=True)
        adapter = adapter_for(model, positions="legacy")
        encoded = adapter.encode(inputs)
        selections, _ = adapter.select(encoded, vidsieve.load("divprune", retention=parse_retention(str(retention))))
        self.pruned = adapter.build(encoded, encoded.per_row(selections))
        self.want = self.pruned.inputs["position_ids"][1:, 0]
        self.model = served(model, retention=retention)
        self.ids, self.features, self.pieces = [], [], []
        whole, at = inputs["input_ids"][0].tolist(), 0
        spans = [("video", n, span) for n, span in enumerate(encoded.videos)]
        spans += [("image", n, span) for n, span in enumerate(encoded.images)]
        for kind, number, span in sorted(spans, key=lambda found: int(found[2].columns[0])):
            start, end = int(span.columns[0]), int(span.columns[-1]) + 1
            told = {f"{kind}_grid_thw": inputs[f"{kind}_grid_thw"][number : number + 1]}
            if kind == "video" and "second_per_grid_ts" in inputs:
                told["second_per_grid_ts"] = inputs["second_per_grid_ts"][number : number + 1]
            if kind == "video" and family == "qwen3_vl":  # a time and a mark before, a mark behind each frame
                told["timestamps"] = [[whole[int(c) - 2] for c in span.columns[:: span.features.grid.per_frame]]]
                start, end = start - 2, end + 1
            if kind == "video":
                self.model._carried = carried(len(selections[number].indices))
                embeds = torch.cat([span.features.embeds, *span.features.deep], 1)
                (piece,) = self.model._postprocess_video_embeds_evs([embeds], told)
            else:
                (piece,) = self.model._postprocess_image_embeds_evs([torch.cat([span.embeds, *span.deep], 1)], told)
            self.ids += whole[at:start]
            place = SimpleNamespace(offset=len(self.ids), length=len(piece))
            data = {name: SimpleNamespace(data=value[0]) for name, value in told.items()}
            self.features.append(SimpleNamespace(modality=kind, mm_position=place, data=data))
            self.ids += [VIDEO if kind == "video" else IMAGE] * len(piece)
            self.pieces.append(piece)
            at = end
        self.ids += whole[at:]

    def run(self, chunk, begin=0):
        """Return embeddings' rows, positions and delta after a prompt was computed from `begin`, `chunk` at a time."""
        rows, delta = self.model.get_mrope_input_positions(self.ids, self.features)
        embeds = []
        for start in range(begin, len(self.ids), chunk):
            some = []
            for feature, piece in zip(self.features, self.pieces, strict=True):
                first = feature.mm_position.offset
                part = piece[max(start - first, 0) : max(start + chunk - first, 0)]
                some += [part] if len(part) else []
            bare, rows, delta = self.model.recompute_mrope_positions(self.ids, some, rows, start)
            embeds += bare
        return torch.cat(embeds) if embeds else None, rows, delta


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("retention", [1.0, 0.5, "2t"])
def test_positions_are_those_under_transformers_however_a_prompt_is_cut(family, retention):
    request = Request(family, retention)
    length = request.want.shape[1]
    assert len(request.ids) == length == len(request.pruned.inputs["input_ids"][0])
    for chunk in (1, 5, 16, length):
        embeds, rows, delta = request.run(chunk)
        assert torch.equal(rows, request.want), f"{chunk} tokens a step"
        assert delta == int(request.want.max()) + 1 - length
    ready = request.pruned.inputs["mm_encoder_outputs"]
    media = torch.tensor([i in (VIDEO, IMAGE) for i in request.ids])
    wanted = request.model.language_model.embed_input_ids(request.pruned.inputs["input_ids"][0]).clone()
    for kind, token in (("video", VIDEO), ("image", IMAGE)):
        wanted[request.pruned.inputs["input_ids"][0] == token] = ready[kind].pooler_output[0]
    torch.testing.assert_close(embeds[:, : wanted.shape[1]], wanted[media])
    if family == "qwen3_vl":  # what is added inside: nothing to the times and marks between frames
        deep = embeds[:, wanted.shape[1] :].chunk(2, 1)
        ids = request.pruned.inputs["input_ids"][0][media]
        for level, got in enumerate(deep):
            torch.testing.assert_close(got[ids == VIDEO], ready["video"].deepstack_features[level][0])
            assert not got[(ids != VIDEO) & (ids != IMAGE)].any()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_text_has_its_positions_before_any_video_is_there(family):
    """Where a prompt's beginning is in the prefix cache, no embedding of its videos ever comes."""
    request = Request(family, 0.5)
    rows, delta = request.model.get_mrope_input_positions(request.ids, request.features)
    text = torch.tensor([i not in (VIDEO, IMAGE) for i in request.ids])
    assert torch.equal(rows[:, text], request.want[:, text])
    assert delta == int(request.want.max()) + 1 - len(request.ids)
    last = request.features[-1].mm_position
    for begin in (last.offset + 1, last.offset + last.length, len(request.ids) - 1):
        _, rows, delta = request.run(7, begin)
        assert torch.equal(rows[:, begin:], request.want[:, begin:]), f"cached up to {begin}"
        assert delta == int(request.want.max()) + 1 - len(request.ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(st.lists(st.tuples(*[st.integers(0, 10**6)] * 3), min_size=1, max_size=5))
def test_positions_survive_any_dtype(dtype, places):
    positions = torch.tensor(places).T
    assert torch.equal(read(written(positions, torch.empty(0, dtype=dtype))), positions)


def test_a_long_video_in_bfloat16():
    """Its moments are beyond what a bfloat16 counts to."""
    served_model = served(FAMILIES["qwen2_5_vl"]())
    grid = torch.tensor([[700, 2, 2]])
    served_model._carried = carried(350)
    features = torch.randn(700, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (piece,) = served_model._postprocess_video_embeds_evs(
        [features], {"video_grid_thw": grid, "second_per_grid_ts": torch.tensor([1.0])}
    )
    times = read(piece[:, -9:])[0]
    assert len(times) == 350 and len(set(times.tolist())) == 350 and int(times.max()) > 1000


def test_what_goes_around_our_pruning_is_refused():
    def engine(rate=None, graphs=False):
        model = SimpleNamespace(multimodal_config=SimpleNamespace(video_pruning_rate=rate))
        return SimpleNamespace(model_config=model, compilation_config=SimpleNamespace(cudagraph_mm_encoder=graphs))

    check_engine(engine())
    check_engine(engine(RATE), RATE)
    with pytest.raises(UnsupportedCallError, match=r"--video-pruning-rate 0\.5 is vLLM's own"):
        check_engine(engine(0.5), RATE)
    with pytest.raises(UnsupportedCallError, match="cudagraph_mm_encoder"):
        check_engine(engine(graphs=True))
