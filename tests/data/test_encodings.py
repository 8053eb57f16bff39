"""A folder of encoded videos: the same to the bit, made once, never another model's, never half a file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from PIL import Image

from vidsieve import load
from vidsieve.adapters.pruning import adapter_for
from vidsieve.answering import chat
from vidsieve.errors import OutputError, TrainingError, UnsupportedCallError
from vidsieve.testbed.files import write_scenes
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for, processor_for
from vidsieve.training.data import encodings, prompts
from vidsieve.training.data.encodings import MANIFEST, EncodingCache
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.recipes import train_policy
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.sources import Files
from vidsieve.training.trainer import Events
from vidsieve.video.reading import read_video


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two scenes and a pseudo-video, with questions and captions in words that every tokenizer here knows."""
    folder = tmp_path_factory.mktemp("files")
    write_scenes(folder, world="dense", seed=1, scenes=2)
    for number, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (48, 40), colour).save(folder / f"{number}.png")
    rows = []
    for number in (0, 1):
        video = {"video": f"scene-{number:04d}.mp4"}
        for question in ("what colour is the home ?", "is the home red ?"):
            rows.append(video | {"question": question, "options": ["red", "blue", "green"], "answer": "blue"})
        rows.append(video | {"caption": "the home is red"})
    rows.append({"frames": [["0.png", 3], ["1.png", 4]], "caption": "red is blue"})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(folder, family, data, seed=0, **settings):
    adapter = adapter_for(FAMILIES[family](seed))
    processor = processor_for(family)
    cache = EncodingCache(folder, adapter, processor, 6) if folder is not None else None
    return adapter, FilePrompts(adapter, processor, data, frames=6, cache=cache, **settings)


@pytest.fixture
def reads(monkeypatch):
    """The videos that were decoded."""
    seen = []
    monkeypatch.setattr(prompts, "read_video", lambda path, **how: seen.append(path) or read_video(path, **how))
    return seen


CACHED = ["llava_onevision", "llava_video", "qwen2_5_vl", "qwen3_vl", "internvl"]


@pytest.mark.parametrize("family", CACHED)
def test_what_is_read_back_is_what_was_encoded(family, data, tmp_path, reads):
    """Prompt, positions, features and rewards of every row: without a cache, while it is made, and from it."""
    adapter, plain = opened(None, family, data)
    wanted = [("choice", number) for number in range(4)] + [("caption", number) for number in range(3)]
    without = [getattr(plain, what)(number) for what, number in wanted]
    found = []
    for turn in range(2):
        _, cached = opened(tmp_path / "cache", family, data)
        reads.clear()
        for (what, number), expected in zip(wanted, without, strict=True):
            sample = getattr(cached, what)(number)
            assert not any(name.startswith(("pixel", "vidsieve")) for name in sample.inputs)
            one, other = Rollouts(adapter, expected.inputs), Rollouts(adapter, sample.inputs)
            assert torch.equal(one.encoded.input_ids, other.encoded.input_ids)
            assert torch.equal(one.encoded.positions, other.encoded.positions)
            assert torch.equal(one.encoded.attention_mask, other.encoded.attention_mask)
            assert one.encoded.rest.keys() == other.encoded.rest.keys()
            first, second = one.encoded.videos[0].features, other.encoded.videos[0].features
            assert first.grid == second.grid and torch.equal(first.embeds, second.embeds)
            assert torch.equal(first.tail, second.tail) and len(first.deep) == len(second.deep)
            assert all(map(torch.equal, first.deep, second.deep))
            assert (first.per_row, first.surplus) == (second.per_row, second.surplus)
            masks = torch.rand(4, first.grid.num_tokens, generator=torch.Generator().manual_seed(number)) < 0.4
            masks[:, 0] = True
            if what == "choice":
                logits = [rollouts.option_logits(masks, sample.option_ids) for rollouts in (one, other)]
            else:
                logits = [rollouts.caption_ce(masks) for rollouts in (one, other)]
            assert torch.equal(*logits)
            found.append(logits[0])
        assert len(reads) == (2 if turn == 0 else 0), "each video once, then never again"
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    assert torch.stack(found[:4]).std() > 0, "rewards that could differ"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_its_own_encoded_video_back(family):
    adapter = adapter_for(FAMILIES[family]())
    inputs = inputs_for(family, [[default_grid(family)]])
    with torch.no_grad():
        whole = adapter.encode(inputs)
    first = whole.videos[0].features
    rest = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
    again = adapter.encode(rest | {"mm_encoder_outputs": adapter.ready_features(first)})
    second = again.videos[0].features
    assert first.grid == second.grid and (first.per_row, first.surplus) == (second.per_row, second.surplus)
    assert torch.equal(first.embeds, second.embeds) and torch.equal(first.tail, second.tail)
    assert len(first.deep) == adapter.deep_layers and all(map(torch.equal, first.deep, second.deep))
    assert torch.equal(whole.positions, again.positions)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cacovid", "score"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_a_policy_trained_from_the_cache_is_the_same(family, method, data, tmp_path, reads):
    few = {"rollouts": 4} if method == "score" else {"token_rollouts": 4, "frame_rollouts": 0, "ratio": 0.2}
    said, weights = [], []
    for name, cache in (("plain", None), ("first", tmp_path / "cache"), ("second", tmp_path / "cache")):
        reads.clear()
        train_policy(
            method,
            FAMILIES[family](),
            processor_for(family),
            tmp_path / name,
            few | {"steps": 3, "prompts_per_step": 2},
            files=Files(data, cache=cache),
            model_name="tiny",
            events=Events(announce=said.append),
        )
        weights.append(load(tmp_path / name).policy.state_dict())
    assert not reads, "the second run decodes nothing"
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])
    videos = 2 if method == "cacovid" else 3
    rows, others = (4, "3 × a caption") if method == "cacovid" else (3, "4 × a question")
    assert said[0].endswith(f"rows.jsonl (vidsieve): {rows} rows used")
    assert said[1] == said[3] == said[6] == f"left out: {others}"
    assert f"has 0 of {videos} videos encoded; the others take about" in said[4]
    assert said[7].endswith(f"has all {videos} videos encoded")


def test_another_model_other_frames_and_another_dtype_are_refused(data, tmp_path):
    folder = tmp_path / "cache"
    adapter, first = opened(folder, "llava_onevision", data)
    first.caption(0)
    processor = processor_for("llava_onevision")
    EncodingCache(folder, adapter, processor, 6)
    with pytest.raises(TrainingError, match=r"other settings \(frames: 6 there, 8 now\): give another folder"):
        EncodingCache(folder, adapter, processor, 8)
    with pytest.raises(TrainingError, match=r"\(weights: .* there, .* now\): .*or remove this one"):
        EncodingCache(folder, adapter_for(FAMILIES["llava_onevision"](1)), processor, 6)
    half = FAMILIES["llava_onevision"]().to(torch.bfloat16)
    with pytest.raises(TrainingError, match=r'dtype: "torch.float32" there, "torch.bfloat16" now'):
        EncodingCache(folder, adapter_for(half), processor, 6)
    with pytest.raises(TrainingError, match=r'family: "llava_onevision" there, "qwen2_5_vl" now; config: '):
        opened(folder, "qwen2_5_vl", data)
    # What the LLM says of a video is no part of its encoding.
    changed = FAMILIES["llava_onevision"]()
    changed.get_output_embeddings().weight.data.zero_()
    EncodingCache(folder, adapter_for(changed), processor, 6)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(TrainingError, match=r"manifest\.json is damaged"):
        EncodingCache(folder, adapter, processor, 6)


def test_files_of_another_model_are_made_again_where_the_manifest_is_gone(data, tmp_path, reads):
    _, first = opened(tmp_path, "llava_onevision", data)
    first.choice(0)
    (tmp_path / MANIFEST).unlink()
    adapter, second = opened(tmp_path, "llava_onevision", data, seed=1)
    _, plain = opened(None, "llava_onevision", data, seed=1)
    one, other = (Rollouts(adapter, p.choice(0).inputs).encoded.videos[0].features for p in (second, plain))
    assert torch.equal(one.embeds, other.embeds)


def test_a_changed_video_and_another_processor_are_encoded_anew(data, tmp_path, reads):
    copied = tmp_path / "data"
    shutil.copytree(data.parent, copied)
    path = copied / "rows.jsonl"
    adapter, made = opened(tmp_path / "cache", "llava_onevision", path)
    row = made.captions[0]
    made._inputs(row, "what ?")
    files = lambda: len(list((tmp_path / "cache").glob("*.safetensors")))  # noqa: E731
    made.cache.finished(made._inputs(row, "what ?"))
    assert files() == 1
    shutil.copy(copied / "scene-0001.mp4", copied / row["video"])
    made.cache.finished(made._inputs(row, "what ?"))
    assert files() == 2
    other = processor_for("llava_onevision")
    other.video_processor.image_mean = [0.1, 0.1, 0.1]
    cache = EncodingCache(tmp_path / "cache", adapter, other, 6)
    again = FilePrompts(adapter, other, path, frames=6, cache=cache)
    cache.finished(again._inputs(row, "what ?"))
    assert files() == 3


def test_a_video_that_changed_at_the_same_size_is_encoded_anew(tmp_path):
    path, image = tmp_path / "rows.jsonl", tmp_path / "0.bmp"
    path.write_text(json.dumps({"frames": [[image.name, 3]], "caption": "the home is red"}))
    Image.new("RGB", (48, 40), "red").save(image)
    adapter, cached = opened(tmp_path / "cache", "llava_onevision", path)
    _, plain = opened(None, "llava_onevision", path)
    size, found = image.stat().st_size, []
    for seconds, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (48, 40), colour).save(image)
        os.utime(image, (seconds, seconds))
        assert image.stat().st_size == size
        samples = [made.caption(0) for made in (cached, plain)]
        one, other = (Rollouts(adapter, sample.inputs).encoded.videos[0].features.embeds for sample in samples)
        assert torch.equal(one, other)
        found.append(one)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    "harm",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: b"\xff" * 300,
        lambda whole: whole.replace(b'"grid', b'"grad'),
        lambda whole: whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:],
    ],
)
def test_a_broken_file_is_made_again(data, tmp_path, reads, harm):
    _, made = opened(tmp_path, "qwen2_5_vl", data)
    number = next(n for n in range(4) if made._row(made.choices, n, "")[1]["video"].endswith("scene-0000.mp4"))
    first = made.choice(number)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    second = made.choice(number)
    assert len(reads) == 2 and path.read_bytes() == whole
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])


# -- space ----------------------------------------------------------------------------------------------------


def test_the_size_is_known_before_and_must_fit(data, tmp_path, monkeypatch):
    _, made = opened(tmp_path / "cache", "llava_onevision", data)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(encodings.shutil, "disk_usage", lambda path: usage(0, 0, 15_000))
    with pytest.raises(OutputError, match=r"do not fit: .* has 0 of 2 videos.* kB each\), 15.0 kB are free. Free some"):
        made.cache.plan(made.videos_to_encode(captions=False))
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    monkeypatch.setattr(encodings.shutil, "disk_usage", lambda path: usage(0, 0, 10**9))
    plan = made.cache.plan(made.videos_to_encode(captions=False))
    size = max(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert (plan.videos, plan.missing) == (2, 2) and 0.9 * size < plan.bytes_each <= size
    assert made.cache.plan(made.videos_to_encode(captions=False)).missing == 1, "the first one is there"


def test_a_full_disk_leaves_no_half_file(data, tmp_path):
    """A limit on the size of files is what a full disk is to the writer."""
    _, made = opened(tmp_path, "llava_onevision", data)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*\.safetensors"):
            made.choice(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    made.choice(0)
    assert len(list(tmp_path.iterdir())) == 2


# -- refusals -------------------------------------------------------------------------------------------------


def test_endless_scenes_have_no_cache(testbed, tmp_path):
    with pytest.raises(TrainingError, match="none was given"):
        train_policy("score", *testbed, tmp_path / "run", {}, files=Files(cache=tmp_path / "cache"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_prompt_that_cannot_be_made_again_is_refused(data, tmp_path):
    """A processor that writes of the video behind the question, too."""
    processor = processor_for("llava_onevision")
    processor.get_text_with_replacements = lambda text, *args: (
        [some.replace("<|video_pad|>", "<|video_pad|>" * 97) + " w50" for some in text],
        None,
    )
    video = read_video(data.parent / "scene-0000.mp4", frames=6)
    assert chat(processor, video, "what ?")["input_ids"][0, -1] == 50
    adapter = adapter_for(FAMILIES["llava_onevision"]())
    made = FilePrompts(adapter, processor, data, frames=6, cache=EncodingCache(tmp_path, adapter, processor, 6))
    with pytest.raises(UnsupportedCallError, match="cannot be made again without the video's pixels"):
        made.choice(0)


def test_the_command(run, data, tmp_path):
    def train(name, *more, code=0):
        settings = ["--model", "testbed", "--steps", 1, "--prompts-per-step", 2, "--rollouts", 2, "--threads", 1]
        return " ".join(run("train", "score", tmp_path / name, *settings, *more, code=code))

    said = train("a", "--data", data, "--cache", tmp_path / "cache")
    assert "has 0 of 3 videos encoded; the others take about" in said and "are free" in said
    assert "none was given" in train("c", "--cache", tmp_path / "cache", code=2)
    assert "is a file" in train("d", "--data", data, "--cache", data / "x", code=2)
