"""Streams: what stays in memory, and answers that equal those of an offline pipeline on the same tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vidsieve
from vidsieve import registry
from vidsieve.adapters.encoded import on_device
from vidsieve.answering import answer, chat
from vidsieve.errors import StreamError
from vidsieve.selection import top_indices
from vidsieve.streaming import BASELINES, Stream
from vidsieve.streaming.memory import StreamTokens
from vidsieve.testing.tiny_models import FAMILIES, processor_for
from vidsieve.types import Selection
from vidsieve.video.reading import Video

SIZES = {
    "llava_onevision": (56, 56),
    "llava_video": (56, 56),
    "qwen2_5_vl": (16, 32),
    "qwen3_vl": (16, 32),
    "internvl": (32, 32),
}
QUESTION = "what colour is the home ?"
MOTION = vidsieve.load("frame_difference")


def trained(name, family, seed=0, **fields):
    """Return a method with a policy for a tiny model, its weights drawn."""
    kind = registry.compressors.get(name)
    network = {"score": {"hidden": 32}, "sieve": {"width": 16}}.get(name, {})
    policy = type(kind.untrained(64).policy).start(64, family, seed=seed, **network)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2, generator=torch.Generator().manual_seed(seed))
    return kind(policy=policy.eval(), **fields)


def pixels_of(family, frames, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, *SIZES[family], 3), dtype=np.uint8)


def video_of(pixels, times):
    return Video(pixels, np.asarray(times), (), times[-1] - times[0], 1.0, len(pixels), pixels.shape[1:3])


def stream_of(family, compressor=MOTION, memory=1000, **more):
    return Stream(FAMILIES[family](), processor_for(family), compressor, memory, **more)


def pushed(stream, pixels, times, cuts=()):
    """Push frames in parts that end at `cuts`."""
    for start, end in zip([0, *cuts], [*cuts, len(pixels)], strict=True):
        stream.push(pixels[start:end], times[start:end])
    return stream


def plan_of(stream):
    """Return the plan that an answer runs."""
    state = stream._advanced(stream._waiting) if stream._waiting else stream._state
    encoded, positions = stream._prompt(state, QUESTION)
    return stream.adapter.plan(encoded, stream.reader), positions


def assert_same_run(stream, plan, ours):
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(plan.inputs[name], ours.inputs[name]), name
    with torch.no_grad():
        theirs, mine = (stream.adapter.model(**one.inputs).logits for one in (plan, ours))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# -- what stays -------------------------------------------------------------------------------------------------------


def memory_of(scores, first):
    count = len(scores)
    numbers = torch.arange(first, first + count)
    return StreamTokens(
        torch.tensor(scores), numbers // 3, numbers % 3, numbers[:, None].float(), (numbers[:, None] + 0.5,)
    )


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6), min_size=1), st.integers(1, 9)
)
def test_merging_piece_by_piece_keeps_the_highest_of_all(pieces, capacity):
    memory, first = memory_of([], 0), 0
    for piece in pieces:
        memory = memory.merged(memory_of(piece, first), capacity)
        first += len(piece)
    every = [score for piece in pieces for score in piece]
    kept = sorted(sorted(range(len(every)), key=lambda i: (-every[i], i))[:capacity])
    assert memory.embeds[:, 0].tolist() == kept and memory.deep[0][:, 0].tolist() == [i + 0.5 for i in kept]
    assert memory.scores.tolist() == [every[i] for i in kept]
    assert (3 * memory.frames + memory.places).tolist() == kept


def test_baselines_keep_a_sample_frames_spread_evenly_or_the_last_ones():
    kept = {}
    for name, baseline in BASELINES.items():
        scores = torch.stack([baseline(frame, 4, 0) for frame in range(400)])
        kept[name] = top_indices(scores.flatten(), 40) // 4
    assert kept["recent"].unique().tolist() == list(range(390, 400))
    assert len(kept["uniform"].unique()) == 10 and kept["uniform"].unique().diff().unique().numel() <= 3
    assert kept["uniform"].unique().diff().max() <= 60
    assert len(kept["random"].unique()) > 30
    halves = [torch.stack([BASELINES["random"](frame, 500, 0) for frame in part]) for part in (range(4), range(4, 8))]
    assert all(abs(float(half.mean()) - 0.5) < 0.05 for half in halves) and not torch.equal(*halves)
    assert not torch.equal(BASELINES["random"](3, 4, 0), BASELINES["random"](3, 4, 1))


def test_the_grid_and_the_indices_of_what_is_kept():
    stream = stream_of("llava_onevision", "recent", memory=18)
    with pytest.raises(StreamError, match="nothing has been pushed"):
        stream.kept()
    grid, kept = pushed(stream, pixels_of("llava_onevision", 5), np.arange(5.0), [2]).kept()
    assert (grid.frames, grid.per_frame) == (5, 16), "else choose another memory here"
    assert kept.tolist() == [48, 49, *range(64, 80)], "the last frame, and of the one before the first tokens"


@pytest.mark.parametrize("method", ["frame_difference", "score", "sieve", "random"])
def test_scores_do_not_depend_on_how_frames_were_pushed(method):
    compressor = {
        "frame_difference": MOTION,
        "score": trained("score", "qwen3_vl"),
        "sieve": trained("sieve", "qwen3_vl", variant="blind"),
    }.get(method, method)
    model, processor = FAMILIES["qwen3_vl"](), processor_for("qwen3_vl")
    pixels, times = pixels_of("qwen3_vl", 9), np.arange(9.0)
    states = []
    for cuts in ((), (1, 2, 3, 4, 5, 6, 7, 8), (3, 8)):
        states.append(pushed(Stream(model, processor, compressor, 15), pixels, times, cuts)._state)
    for other in states[1:]:
        for name in ("scores", "frames", "places", "embeds"):
            torch.testing.assert_close(getattr(states[0].memory, name), getattr(other.memory, name))
    offline = offline_scores(model, processor, compressor, pixels[:8], times[:8]) if method != "random" else None
    if offline is not None:
        kept = top_indices(offline, 15)
        torch.testing.assert_close(states[0].memory.scores, offline[kept], rtol=1e-5, atol=1e-5)
        assert torch.equal(8 * states[0].memory.frames + states[0].memory.places, kept)


def offline_scores(model, processor, compressor, pixels, times):
    """Return the scores of a whole video that is encoded and scored at once."""
    stream = Stream(model, processor, compressor)
    encoded = stream.adapter.encode(chat(processor, video_of(pixels, times), QUESTION))
    with torch.no_grad():
        return compressor.score(stream.adapter.video_tokens(encoded, 0)).float()


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SIZES)
def test_with_memory_for_all_tokens_an_answer_is_that_of_the_ordinary_pipeline(family):
    frames = 7 if family.startswith("qwen") else 6
    pixels, times = pixels_of(family, frames), [0.5 + 0.8 * n for n in range(frames)]
    stream = pushed(stream_of(family), pixels, times, (1, 4))
    adapter, video = stream.adapter, video_of(pixels, times)
    theirs = adapter.plan(adapter.encode(on_device(chat(stream.processor, video, QUESTION), adapter.device)))
    assert_same_run(stream, theirs, plan_of(stream)[0])
    expected = answer(adapter.model, stream.processor, video, QUESTION, max_new_tokens=8)
    got = stream.ask(QUESTION, max_new_tokens=8)
    assert got.text == expected.text and got.prompt_tokens[1] == expected.prompt_tokens[1]
    assert got.memory.positions == "original" and got.memory.tokens == got.memory.read
    assert got.text == stream.ask(QUESTION, max_new_tokens=8).text


@pytest.mark.parametrize("limit", [4096, 80], ids=["original", "in order"])
@pytest.mark.parametrize("family", SIZES)
def test_with_less_memory_an_answer_is_that_of_an_offline_run_on_the_kept_tokens(family, limit):
    frames, kept = 20, 13
    pixels, times = pixels_of(family, frames), [0.5 + 0.7 * n for n in range(frames)]
    stream = stream_of(family, memory=kept)
    stream._range = limit
    pushed(stream, pixels, times, (1, 4, 11))
    adapter, processor = stream.adapter, stream.processor
    encoded = adapter.encode(chat(processor, video_of(pixels, times), QUESTION))
    chosen = top_indices(MOTION.score(adapter.video_tokens(encoded, 0)), kept)
    if limit == 80:  # the prompt is one of the frames that have tokens
        grid = encoded.videos[0].features.grid
        held = (chosen // grid.per_frame).unique()
        assert 1 < len(held) < grid.frames
        pictures = (held[:, None] * (frames // grid.frames) + torch.arange(frames // grid.frames)).flatten()
        encoded = adapter.encode(
            chat(processor, video_of(pixels[pictures], np.array(times)[pictures]), QUESTION, spacing=0.7)
        )
        chosen = torch.searchsorted(held, chosen // grid.per_frame) * grid.per_frame + chosen % grid.per_frame
    plan = adapter.build(encoded, [[Selection(chosen)]])
    if limit == 80 and adapter.position_rows == slice(None):
        plan.inputs["position_ids"] = torch.arange(plan.inputs["input_ids"].shape[1])[None]
    ours, positions = plan_of(stream)
    assert positions == ("original" if limit == 4096 else "in order")
    assert_same_run(stream, plan, ours)


def test_times_in_words_are_those_of_the_frames_that_have_tokens(monkeypatch):
    stream, texts = stream_of("qwen3_vl", "uniform", memory=24), []
    kind = type(stream.processor.tokenizer)
    write = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, text, *a, **k: texts.append(text) or write(self, text, *a, **k))
    pushed(stream, pixels_of("qwen3_vl", 20), [0.5 * n * n for n in range(1, 21)])
    for limit in (4096, 80):
        stream._range = limit
        plan_of(stream)
        frames = range(10) if limit == 4096 else stream._state.memory.frames.unique().tolist()
        means = [0.25 * ((2 * n + 1) ** 2 + (2 * n + 2) ** 2) for n in frames]
        assert re.findall(r"<([\d.]+) seconds>", texts[-1][0]) == [f"{mean:.1f}" for mean in means]
    assert len(frames) == 3


def test_what_a_stream_holds_and_what_a_question_reads_stop_growing():
    def held(stream):
        state = stream._state
        tensors = [value for value in (*vars(state).values(), *vars(state.memory).values()) if torch.is_tensor(value)]
        sizes = [t.untyped_storage().nbytes() for t in (*tensors, *state.memory.deep)]
        inputs = plan_of(stream)[0].inputs
        return sum(sizes), inputs["input_ids"].shape[1]

    stream = stream_of("llava_onevision", "uniform", memory=40)
    stream._range = 256
    sizes = []
    for part in range(4):
        pixels = pixels_of("llava_onevision", 24, seed=part)
        pushed(stream, pixels, 24.0 * part + np.arange(24))
        sizes.append(held(stream))
    assert sizes[1][0] <= sizes[0][0] and sizes[3] == sizes[2] == sizes[1]
    assert stream.ask(QUESTION, max_new_tokens=1).memory.frames_seen == 96


@pytest.mark.parametrize(
    ("family", "retention"), [("qwen3_vl", 0.4), ("qwen3_vl", vidsieve.Tokens(5)), ("llava_video", 0.4)]
)
def test_a_reader_that_reads_the_question_chooses_among_the_tokens_in_memory(family, retention):
    reader = trained("sieve", stream_of(family).adapter.family, retention=retention)
    pixels, times = pixels_of(family, 8), np.arange(8.0)
    whole = pushed(stream_of(family, reader=reader), pixels, times)
    adapter = whole.adapter
    encoded = adapter.encode(chat(whole.processor, video_of(pixels, times), QUESTION))
    assert_same_run(whole, adapter.plan(encoded, reader), plan_of(whole)[0])
    little = pushed(stream_of(family, memory=20, reader=reader), pixels, times)
    told = little.ask(QUESTION, max_new_tokens=1).memory
    assert (told.tokens, told.read) == (20, 8 if retention == 0.4 else 5)


def test_two_streams_do_not_know_of_each_other():
    model, processor = FAMILIES["qwen2_5_vl"](), processor_for("qwen2_5_vl")
    both = [Stream(model, processor, MOTION, 12) for _ in range(2)]
    videos = [pixels_of("qwen2_5_vl", 8, seed) for seed in range(2)]
    for frame in range(8):
        for stream, video in zip(both, videos, strict=True):
            stream.push(video[frame : frame + 1], float(frame))
    alone = pushed(Stream(model, processor, MOTION, 12), videos[0], np.arange(8.0))
    torch.testing.assert_close(both[0]._state.memory.embeds, alone._state.memory.embeds)
    assert both[0].ask(QUESTION, max_new_tokens=6).text == alone.ask(QUESTION, max_new_tokens=6).text
    assert not torch.equal(both[0]._state.memory.embeds, both[1]._state.memory.embeds)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_stream_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    pixels, times = pixels_of("qwen3_vl", 15), np.arange(15.0)
    whole = pushed(stream_of("qwen3_vl", memory=12), pixels, times)
    first = pushed(stream_of("qwen3_vl", memory=12), pixels[:7], times[:7])  # one picture waits
    first.save(tmp_path / "stream.safetensors")
    second = Stream.load(tmp_path / "stream.safetensors", FAMILIES["qwen3_vl"](), processor_for("qwen3_vl"), MOTION)
    plans = [plan_of(stream)[0].inputs for stream in (first, second)]
    assert torch.equal(
        plans[0]["mm_encoder_outputs"]["video"].pooler_output[0],
        plans[1]["mm_encoder_outputs"]["video"].pooler_output[0],
    )
    with torch.no_grad():
        assert torch.equal(*(first.adapter.model(**inputs).logits for inputs in plans))
    pushed(second, pixels[7:], times[7:])
    answers = [stream.ask(QUESTION, max_new_tokens=8) for stream in (whole, second)]
    assert answers[0].text == answers[1].text and answers[0].memory == answers[1].memory


def test_a_stream_goes_on_with_frames_of_as_many_tokens_only(tmp_path):
    stream, pixels = stream_of("qwen2_5_vl"), pixels_of("qwen2_5_vl", 4)
    pushed(stream, pixels[:2], [0.0, 1.0])
    stream.save(tmp_path / "a")
    smaller = processor_for("qwen2_5_vl")
    smaller.video_processor.size["longest_edge"] = 128
    loaded = Stream.load(tmp_path / "a", stream.adapter.model, smaller, MOTION)
    with pytest.raises(StreamError, match="the processor that the stream began with"):
        pushed(loaded, pixels[2:], [2.0, 3.0])


def test_a_stream_before_its_first_whole_frame_is_saved_too(tmp_path):
    pixels, times = pixels_of("qwen2_5_vl", 4), np.arange(4.0)
    stream = pushed(stream_of("qwen2_5_vl", "random", seed=3), pixels[:1], times[:1])
    stream.save(tmp_path / "a")
    loaded = Stream.load(tmp_path / "a", stream.adapter.model, stream.processor, "random")
    for one in (stream, loaded):
        pushed(one, pixels[1:], times[1:])
    assert torch.equal(stream._state.memory.scores, loaded._state.memory.scores)


def test_a_file_of_another_model_method_or_kind_is_refused(tmp_path):
    path = tmp_path / "stream.safetensors"
    stream = pushed(stream_of("qwen2_5_vl", trained("score", "qwen2_5_vl")), pixels_of("qwen2_5_vl", 2), [0.0, 1.0])
    stream.save(path)
    model, processor = stream.adapter.model, stream.processor
    assert Stream.load(path, model, processor, trained("score", "qwen2_5_vl")).memory == 1000
    other = trained("score", "qwen2_5_vl", seed=1)
    for wrong, said in ((MOTION, "method"), (other, "policy"), ("recent", "method")):
        with pytest.raises(StreamError, match=f"made with the {said}"):
            Stream.load(path, model, processor, wrong)
    with pytest.raises(StreamError, match=r"made with the reader none, this is 'divprune \(.*: use the same"):
        Stream.load(
            path, model, processor, trained("score", "qwen2_5_vl"), reader=vidsieve.load("divprune", retention=0.5)
        )
    with pytest.raises(StreamError, match="made with the family"):
        Stream.load(path, FAMILIES["qwen3_vl"](), processor_for("qwen3_vl"), "recent")
    broken = bytearray(path.read_bytes())
    broken[-3] ^= 1
    (tmp_path / "broken").write_bytes(broken)
    with pytest.raises(StreamError, match="damaged"):
        Stream.load(tmp_path / "broken", model, processor, trained("score", "qwen2_5_vl"))
    stream.compressor.policy.save_pretrained(tmp_path)
    with pytest.raises(StreamError, match="is no stream"):
        Stream.load(tmp_path / "model.safetensors", model, processor, MOTION)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compressor", "said"),
    [
        (trained("sieve", "llava_onevision"), "variant 'blind'"),
        (vidsieve.load("divprune"), "no score that a frame alone tells"),
        (vidsieve.load("random"), "give its name, 'random'"),
        (vidsieve.load("fastv"), "as the reader"),
        (trained("visionselector", "llava_onevision"), "by the whole video"),
        (vidsieve.load("frame_difference", first_frame="next"), "by the whole video"),
        (vidsieve.Pipeline(vidsieve.Reuse(), MOTION), "leave it out of a stream"),
        (vidsieve.load("frame_difference", retention=vidsieve.Tokens(8)), "a fraction"),
        ("newest", "one of random, uniform, recent"),
        (type(MOTION), "one of random, uniform, recent"),
    ],
)
def test_compressors_that_cannot_score_a_frame_when_it_comes_are_refused(compressor, said):
    with pytest.raises(StreamError, match=said):
        stream_of("llava_onevision", compressor)


def test_memory_readers_and_families_that_cannot_serve_are_refused():
    for memory in (0, 4096, 12.5, True):
        with pytest.raises(StreamError, match="from 1 to 4095"):
            stream_of("llava_onevision", memory=memory)
    for reader in (vidsieve.load("visionzip"), vidsieve.Pipeline(vidsieve.Reuse(), MOTION)):
        with pytest.raises(StreamError, match="needs the vision encoder"):
            stream_of("llava_onevision", reader=reader)


def test_frames_and_questions_that_make_no_sense_are_refused():
    stream, pixels = stream_of("llava_onevision", memory=30), pixels_of("llava_onevision", 4)
    for call in (lambda: stream.ask(QUESTION), lambda: stream.save("nowhere")):
        with pytest.raises(StreamError, match="nothing has been pushed"):
            call()
    stream.push([Image.fromarray(frame) for frame in pixels[:2]], [0, 1])
    for frames, times, said in (
        (pixels[:1], 1.0, "times must rise"),
        (pixels[:2], [3, 2], "times must rise"),
        (pixels[:1], float("nan"), "times must rise"),
        (pixels[:2], 3.0, "need 2 times"),
        (pixels[:1, :28], 3.0, "one size"),
        (pixels[0], 3.0, "uint8 array"),
        (pixels[:1] / 255, 3.0, "uint8 array"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], [3, 4], "one size"),
    ):
        with pytest.raises(StreamError, match=said):
            stream.push(frames, times)
    stream.adapter.model.model.vision_tower.forward = None
    with pytest.raises(TypeError):
        stream.push(pixels[2:], [2, 3])
    del stream.adapter.model.model.vision_tower.forward
    stream.push(pixels[2:], [2, 3])
    assert stream.ask(QUESTION, max_new_tokens=1).memory.frames_seen == 4
    stream._range = 24
    with pytest.raises(StreamError, match="keep fewer tokens in memory"):
        stream.ask(QUESTION)
