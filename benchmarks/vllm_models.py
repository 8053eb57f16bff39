"""Every model that vLLM serves with every kind of method: answers, prompts and kept tokens as under transformers.

Needs an environment of its own (`make test-vllm`). vLLM's engine runs in this process, on small random models; the
transformers path runs on the frames that vLLM's own reader makes of the same files. `vllm_serving` goes over HTTP.

    PYTHONPATH=. python benchmarks/vllm_models.py --json benchmarks/results/vllm_models.json
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer
from transformers.video_utils import VideoMetadata

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.template import Template
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.compressors.score import ScorePolicy
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model, shipped_model
from vidsieve.serving.vllm.shared import digest
from vidsieve.testbed.files import FPS
from vidsieve.testbed.questions import make_questions
from vidsieve.testbed.world import make_cast, render
from vidsieve.testing.tiny_models import FAMILIES, processor_for
from vidsieve.video.reading import write_video
from workbench.families import tiny

FRAMES, TOKENS = 16, 8
ENOUGH = 24  # frames of Qwen's, two a moment, of which EVS, which keeps the first moment whole, can keep a tenth
CHUNK = 160  # tokens a step, of all requests: prompts are cut in the middle of a video, and go on in another batch
SPELT = 200  # the same with blanks between words: a video must fit
RETENTIONS = (1.0, 0.25, 0.1)
METHODS = ("score", "cacovid", "evs", "divprune")
SMALL = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
"""Families of small random models."""
ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def qwen(family: str, folder: Path, most: int = 64) -> tuple[Any, Any]:
    """Return a small random model of one of Qwen's `SMALL` families with its processor, both written to a folder.

    Frames of Qwen2.5-VL have at most `most` tokens: vLLM encodes no more at once than the larger of a step and its
    largest video, here 512.
    """
    made = FAMILIES[family]() if family in FAMILIES else tiny(family).model(0, tiny(family).layers)
    config, rope = made.config, dict(made.config.text_config.rope_parameters)
    # Heads of 32, the least that vLLM's CPU kernels take.
    sections = [2, 3, 3] if rope.get("partial_rotary_factor", 1.0) == 0.5 else [4, 6, 6]
    config.text_config.update(
        {"hidden_size": 128, "intermediate_size": 256, "rope_parameters": rope | {"mrope_section": sections}}
        | ({} if family == "qwen2_5_vl" else {"head_dim": 32})
        | ({"vocab_size": 256} if family.startswith("qwen3_5") else {})  # for `spelling`
        | ({"norm_topk_prob": True} if family == "qwen3_vl_moe" else {})  # as its checkpoints say: vLLM reads it
    )
    config.vision_config.update({"hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128})
    torch.manual_seed(0)
    model = type(made)(config).eval()
    for name, weight in model.named_parameters():  # wide enough that answers depend on the video
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
        elif name.endswith("A_log"):  # recurrent layers that do not forget the video before the question
            torch.nn.init.constant_(weight, -5.0)
    processor = processor_for("qwen2_5_vl" if family == "qwen2_5_vl" else "qwen3_vl")
    if family == "qwen2_5_vl":
        adapter_for(model).limit_frames(processor, most)
    else:
        processor.tokenizer = telling_time(processor.tokenizer)
    if family.startswith("qwen3_5"):
        processor.tokenizer = spelling(processor.tokenizer)
        processor.chat_template += "{{ '\\n' }}"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.tokenizer = AutoTokenizer.from_pretrained(folder)
    if family == "qwen3_vl_moe":
        turn_experts(folder / "model.safetensors")
    return model, processor


def turn_experts(path: Path) -> None:
    """Transpose experts as published checkpoints have them; transformers writes those of a new model as they are."""
    weights = load_file(path)
    turned = {name: w.transpose(1, 2).contiguous() if ".experts." in name else w for name, w in weights.items()}
    save_file(turned, path, {"format": "pt"})


def telling_time(tokenizer: Any) -> Any:
    """Return a tokenizer of tiny models in which each tenth of a second up to eight has a token of its own."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    spare = sorted(number for word, number in words.items() if re.fullmatch(r"w\d+", word))[:80]
    named = {number: f"<{place / 10:.1f}" for place, number in enumerate(spare)}
    state["model"]["vocab"] = {named.get(number, word): number for word, number in words.items()}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def spelling(tokenizer: Any) -> Any:
    """Return a tokenizer whose words are added tokens, and which spells others.

    Whatever class a tokenizer had, transformers loads that of Qwen3.5 as Qwen's own, by bytes and without words.
    """
    words = tokenizer.get_vocab()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    letters = [letter for letter in (*map(chr, range(33, 127)), "\u0120", "\u010a") if letter not in words]
    state["model"]["vocab"] |= {letter: 128 + number for number, letter in enumerate(letters)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in sorted(words, key=words.get)])
    return tokenizer


def policies(model: Any, folder: Path) -> dict[str, str]:
    """Write policies that were never trained, and return their folders by method."""
    adapter = adapter_for(model)
    score = ScorePolicy.start(adapter.hidden_size, adapter.family, variant="ours", seed=1, base_model="tiny")
    shape, weights = start(adapter)
    cacovid = CaCoVIDPolicy.of_shape(shape, adapter.family, variant="ours", layers=[weights], seed=1, base_model="tiny")
    for name, policy in (("score", score), ("cacovid", cacovid)):
        for parameter in policy.parameters():  # some start at zero, and leave the question out
            torch.nn.init.normal_(parameter, std=0.5)
        policy.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("score", "cacovid")}


def start(adapter: Adapter) -> tuple[BlockShape, dict[str, Any]]:
    """Return shape and weights of the first layer; of Qwen3.5, whose layers a policy cannot take over, just a shape."""
    if adapter.family.startswith("qwen3_5"):
        return BlockShape.of_width(adapter.hidden_size), {}
    state = adapter.layer_state(0)
    return state.shape, dict(state.weights)


def loaded(path: Path, frames: int) -> tuple[Any, dict[str, Any]]:
    """Return so many frames of a file, by vLLM's own reader, and what it says about them."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    pixels, about = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(path.read_bytes(), num_frames=frames)
    return np.asarray(pixels), about


def read(path: Path, frames: int) -> tuple[Any, VideoMetadata]:
    """Return frames as `loaded`, and what transformers' processors read of the rest."""
    pixels, about = loaded(path, frames)
    return pixels, VideoMetadata(**{key: about[key] for key in about if key != "do_sample_frames"})


def prompt_of(processor: Any, videos: int, question: str) -> str:
    """Return the prompt that asks a question about so many videos."""
    content = [*({"type": "video"} for _ in range(videos)), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def inputs_of(processor: Any, clips: Sequence[tuple[Any, Any]], question: str) -> dict[str, Any]:
    """Return the processor's inputs that ask one question about videos as `read` gives them."""
    text = prompt_of(processor, len(clips), question)
    pixels, about = ([clip[part] for clip in clips] for part in (0, 1))
    made = processor(text=[text], videos=pixels, video_metadata=about, do_sample_frames=False, return_tensors="pt")
    return dict(made)


@torch.no_grad()
def locally(
    model: Any, processor: Any, paths: Sequence[Path], question: str, method: Any, frames: int = FRAMES
) -> tuple[str, int, set[str]]:
    """Return answer, prompt tokens and digests of what was kept, under transformers in vLLM's position mode.

    Of several videos each is selected from alone, as vLLM does: it encodes them before it knows what is around them.
    """
    clips = [read(path, frames) for path in paths]
    inputs = inputs_of(processor, clips, question)
    positions = "legacy" if "video_grid_thw" in inputs else "compact"
    adapter = adapter_for(model, Template.of(processor), positions)
    encoded = adapter.encode(inputs)
    selections = encoded.everything()
    if method is not None:
        alone = (adapter.encode(inputs_of(processor, [clip], question), needs=method.needs) for clip in clips)
        selections = [adapter.select(one, method)[0][0] for one in alone]
    pruned = adapter.build(encoded, encoded.per_row(selections))
    stop = processor.tokenizer.eos_token_id
    out = model.generate(**pruned.inputs, max_new_tokens=TOKENS, do_sample=False, use_cache=True, eos_token_id=stop)
    length = pruned.inputs["input_ids"].shape[1]
    text = processor.tokenizer.decode(out[0, length:], skip_special_tokens=True)
    return text.strip(), length, {digest(one.indices) for one in selections} if method is not None else set()


class Selected(logging.Handler):
    """Digests of the selections that the plug-in logs."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Note the digest of a record "… kept … of … video tokens, digest"."""
        self.marks.update(re.findall(r"video tokens, (\w{12})", record.getMessage()))


def matrix(family: str, folder: Path, asked: list[tuple[list[Path], str]]) -> dict[str, Any]:
    """Return, by method and retention, how many requests about videos get what they do under transformers."""
    if family == "testbed":  # the shallow one: vLLM refuses sliding windows in some layers alone
        model, processor = load_model("testbed:shallow")
        where = str(shipped_model("testbed:shallow"))
    else:
        model, processor = qwen(family, folder / family, most=36)
        where = str(folder / family)
    frames = FRAMES if family == "testbed" else ENOUGH
    step = SPELT if family.startswith("qwen3_5") else CHUNK
    folders = policies(model, folder / "policies" / family)
    jobs = [(clips, question, kept) for clips, question in asked for kept in RETENTIONS]
    rows: dict[str, Any] = {"tokens_a_step": step}
    for method in METHODS:
        policy = {"policy": folders[method]} if method in folders else {}
        answers, marks = served(where, processor, {"method": method, **policy}, jobs, frames, step)
        tally = {
            kept: dict.fromkeys(("requests", "same_text", "same_tokens", "same_indices"), 0) for kept in RETENTIONS
        }
        differ, texts, selections = [], set(), set()
        for (clips, question, kept), (said, tokens) in zip(jobs, answers, strict=True):
            chosen = vidsieve.load(method, folders.get(method), retention=kept) if kept < 1 else None
            text, length, wanted = locally(model, processor, clips, question, chosen, frames)
            texts.add(text)
            selections |= wanted
            counts = tally[kept]
            counts["requests"] += 1
            counts["same_text"] += said == text
            counts["same_tokens"] += tokens == length
            counts["same_indices"] += wanted <= marks
            if said != text:
                differ.append([[clip.name for clip in clips], question, kept, said, text])
        rows[method] = {
            "by_retention": tally,
            "different_texts": len(texts),
            "different_selections": len(selections),  # more where the question is read
            "differ": differ,
        }
        print(family, method, json.dumps(rows[method]), flush=True)
    return rows


def served(
    where: str,
    processor: Any,
    settings: dict[str, Any],
    jobs: Sequence[tuple[list[Path], str, float]],
    frames: int,
    step: int,
) -> tuple[list[tuple[str, int]], set[str]]:
    """Return text and prompt tokens of every request, all in one batch, and the digests of what was kept."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        where,
        dtype="float32",
        enforce_eager=True,
        skip_mm_profiling=True,
        limit_mm_per_prompt={"video": 2, "image": 0},
        hf_overrides={"vidsieve": settings},
        mm_processor_kwargs={"do_sample_frames": False},  # the reader has sampled
        max_model_len=2048,
        max_num_batched_tokens=step,
        max_num_seqs=8,
    )
    prompts = []
    for clips, question, kept in jobs:
        more = {"question": question} if settings["method"] == "cacovid" else {}
        prompts.append(
            {
                "prompt": prompt_of(processor, len(clips), question),
                "multi_modal_data": {"video": [loaded(clip, frames) for clip in clips]},
                "mm_processor_kwargs": {"vidsieve": {"retention": kept, **more}},
            }
        )
    selected, log = Selected(), logging.getLogger("vllm.vidsieve")
    log.addHandler(selected)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
    log.removeHandler(selected)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return [(out.outputs[0].text.strip(), len(out.prompt_token_ids)) for out in outputs], selected.marks


def questions(folder: Path, scenes: int, each: int, parts: int = 1) -> list[tuple[Path, str]]:
    """Write videos of the testbed with `parts` scenes each, and return so many questions about each video."""
    found = []
    for index in range(scenes):
        path = folder / f"scene-{index}.mp4"
        shown = [render(make_cast("dense", 91, index + n), 91, index + n) for n in range(parts)]
        write_video(path, np.concatenate(shown), parts * FPS)
        found += [(path, q.text) for q in make_questions(make_cast("dense", 91, index), 91, index)[:each]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("testbed", *SMALL))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(ENGINE, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    import vllm

    import float32_gdn

    float32_gdn.register()
    result: dict[str, Any] = {"machine": machine(), "vllm": vllm.__version__}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text()) | result
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = questions(folder, 4, 2, parts=2)
        asked = [([video], question) for video, question in about]
        # Two videos in a prompt, of which one comes twice.
        asked += [([video, about[-1 - n][0]], question) for n, (video, question) in enumerate(about[::2])]
        for family in ("testbed", *SMALL):
            if options.only in (None, family):
                result[family] = matrix(family, folder, asked)
                if options.json:
                    write_result(options.json, result)


if __name__ == "__main__":
    main()
