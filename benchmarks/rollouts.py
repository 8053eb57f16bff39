"""Rollouts per second of the dense rewards against generated answers, and how often the two agree.

A prompt has 32 masks, drawn as in training (24 by tokens, 8 by frames, r = 0.02). "Whole" starts from pixels and
encodes the video once for all masks; "the release's form" runs each rollout alone: pixels, vision tower, projector,
pruning, generate. Two models: the testbed's, which answers with one word and ends; and a larger one with random
weights (8 layers of width 512, 8 frames of 196 tokens), which never ends by itself, so that its answers have 2 tokens
(a letter and the end) or 16 (the most in training). Rollouts one by one are run on some of the masks only.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vidsieve
from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.cli.shared import quiet
from vidsieve.compressors.base import Compressor
from vidsieve.io.machine import machine, spread, write_result
from vidsieve.loading import load_model
from vidsieve.selection import mask_to_indices
from vidsieve.testbed.model import chat_inputs
from vidsieve.testbed.questions import make_questions
from vidsieve.testbed.world import make_cast, render
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.judging import judge
from vidsieve.training.rewards import choice_reward, margin_reward
from vidsieve.training.rollouts import Packing, Rollouts
from vidsieve.training.sampling import bernoulli_masks, frame_masks, token_masks
from vidsieve.training.settings import CaCoVIDConfig
from vidsieve.types import Need, Selection, TokenGrid

SEED = 9001
ANSWER = CaCoVIDConfig.answer_tokens
RELEASE, ALONE, CAPTIONS = 2, 8, 8
"""Rollouts a repeat in the release's form, one by one, and of captions."""
SIZES = (1, 512, 2048, 8192)


@dataclass(frozen=True)
class Prompt:
    """Pixels and words of one question, a caption's inputs, the options' ids, the right option's number and word."""

    inputs: dict[str, Any]
    captioned: dict[str, Any]
    option_ids: Tensor
    answer: int
    truth: str


def testbed_prompts() -> tuple[Adapter, Any, Iterator[Prompt]]:
    """Return the testbed's adapter, its tokenizer, and questions with their pixels."""
    model, processor = load_model("testbed")
    prompts = ScenePrompts(adapter_for(model), processor, seed=SEED)

    def questions() -> Iterator[Prompt]:
        scene = 0
        while True:
            cast = make_cast("dense", SEED, scene)
            question, frames = make_questions(cast, SEED, scene)[0], render(cast, SEED, scene)
            ids = processor.tokenizer(list(question.options), add_special_tokens=False)["input_ids"]
            caption = dict(prompts.caption(scene).inputs)
            yield Prompt(
                chat_inputs(processor, frames, [question.text]),
                caption,
                torch.tensor(ids).flatten(),
                question.options.index(question.answer),
                question.answer,
            )
            scene += 1

    return prompts.adapter, processor.tokenizer, questions()


def larger_prompts() -> tuple[Adapter, Any, Iterator[Prompt]]:
    """Return a random LLaVA-OneVision of 25 million parameters in its layers, and random words around a video."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        image_token_index=8001,
        video_token_index=8000,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    draw = torch.Generator().manual_seed(SEED)

    def questions() -> Iterator[Prompt]:
        while True:
            words, caption = (torch.randint(10, 8000, (count,), generator=draw) for count in (40, 60))
            video = torch.full((8 * 196 + 1,), config.video_token_id)
            ids = torch.cat([words[:10], video, words[10:]])[None]
            pixels = torch.randn(1, 8, 3, 384, 384, generator=draw)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}
            longer = torch.cat([ids, caption[None]], 1)
            labels = longer.clone()
            labels[:, : ids.shape[1]] = -100
            captioned = {"input_ids": longer, "attention_mask": torch.ones_like(longer), "labels": labels}
            yield Prompt(inputs, captioned | {"pixel_values_videos": pixels}, torch.tensor([20, 21, 22, 23]), 0, "a")

    return adapter_for(model), None, questions()


def training_masks(grid: TokenGrid, seed: int) -> Tensor:
    """Return the keep-masks (32, N) bool of one prompt of CaCoVID's training, for scores that are noise."""
    c, draw = CaCoVIDConfig(), torch.Generator().manual_seed(seed)
    tokens, frames = (torch.randn(count, generator=draw) for count in (grid.num_tokens, grid.frames))
    by_tokens = token_masks(tokens, grid, c.ratio, c.token_rollouts, draw, width=c.width)
    _, by_frames = frame_masks(tokens, frames, grid, c.ratio, c.frame_rollouts, draw, width=c.width)
    return torch.cat([by_tokens, by_frames])


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def release(adapter: Adapter, prompt: Prompt, masks: Tensor, steps: int, decode: Callable[[Tensor], object]) -> None:
    """Run rollouts as the release does: one by one, nothing kept from one to the next."""
    for mask in masks:
        built = adapter.build(adapter.encode(prompt.inputs), [[Selection(mask_to_indices(mask))]])
        out = adapter.model.generate(**built.inputs, max_new_tokens=steps, do_sample=False)
        decode(out[:, built.inputs["input_ids"].shape[1] :])


def forms(
    adapter: Adapter, tokenizer: Any, prompt: Prompt, seed: int, steps: tuple[int, ...]
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return by name the ways to run one prompt's rollouts, each with the number of rollouts that it runs."""
    ready, captioned = Rollouts(adapter, prompt.inputs), Rollouts(adapter, prompt.captioned)
    ready_alone, captioned_alone = copy.copy(ready), copy.copy(captioned)
    ready_alone.packing = captioned_alone.packing = Packing(adapter.model, 1)
    grid = ready.encoded.videos[0].features.grid
    masks, options = training_masks(grid, seed), prompt.option_ids
    draw = torch.Generator().manual_seed(seed)
    tenth = bernoulli_masks(torch.full((grid.num_tokens,), 0.1), CAPTIONS, draw)

    def decode(ids: Tensor) -> None:
        if tokenizer is not None:
            for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
                judge("multiple choice", text, prompt.truth)

    def choice(rollouts: Rollouts, masks: Tensor = masks) -> Tensor:
        return choice_reward(rollouts.option_logits(masks, options), prompt.answer)

    def margin(rollouts: Rollouts) -> Tensor:
        return margin_reward(rollouts.option_logits(masks, options), prompt.answer)

    few, some, count = masks[:RELEASE], masks[:ALONE], len(masks)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "encoding": (1, lambda: Rollouts(adapter, prompt.inputs)),
        "choice, whole": (count, lambda: choice(Rollouts(adapter, prompt.inputs))),
        "margin, whole": (count, lambda: margin(Rollouts(adapter, prompt.inputs))),
        "choice": (count, lambda: choice(ready)),
        "margin": (count, lambda: margin(ready)),
        "choice, one by one": (len(some), lambda: choice(ready_alone, some)),
        "caption_ce": (len(tenth), lambda: captioned.caption_ce(tenth)),
        "caption_ce, one by one": (len(tenth), lambda: captioned_alone.caption_ce(tenth)),
    }
    for longest in steps:
        ways |= {
            f"generate {longest}": (count, lambda n=longest: decode(ready.generate(masks, n))),
            f"generate {longest}, one by one": (len(some), lambda n=longest: decode(ready_alone.generate(some, n))),
            f"generate {longest}, the release's form": (
                len(few),
                lambda n=longest: release(adapter, prompt, few, n, decode),
            ),
        }
    return ways


def speed(
    adapter: Adapter, tokenizer: Any, prompts: Iterator[Prompt], steps: tuple[int, ...], repeats: int
) -> dict[str, Any]:
    """Return rollouts per second of every form and the ratios between them, repeat by repeat on another prompt."""
    rates: dict[str, list[float]] = {}
    warm = time.perf_counter() + 5
    for _, work in forms(adapter, tokenizer, next(prompts), 0, steps[:1]).values():
        if time.perf_counter() < warm:
            work()
    for repeat in range(repeats):
        ways = list(forms(adapter, tokenizer, next(prompts), repeat + 1, steps).items())
        for name, (count, work) in ways if repeat % 2 else ways[::-1]:
            seconds = timed(work)
            rates.setdefault(name, []).append(count / seconds)
    pairs = {
        "choice packed / one by one": ("choice", "choice, one by one"),
        "caption_ce packed / one by one": ("caption_ce", "caption_ce, one by one"),
    }
    for longest in steps:
        dense, generated = "choice, whole", f"generate {longest}"
        pairs |= {
            f"choice / generate {longest}, same batch": ("choice", generated),
            f"margin / generate {longest}, same batch": ("margin", generated),
            f"choice / generate {longest}, the release's form, both whole": (dense, f"{generated}, the release's form"),
            f"margin / generate {longest}, the release's form, both whole": (
                "margin, whole",
                f"{generated}, the release's form",
            ),
            f"generate {longest} packed / one by one": (generated, f"{generated}, one by one"),
        }
    return {
        "rollouts_per_second": {name: spread(values) for name, values in rates.items()},
        "times": {
            name: spread([x / y for x, y in zip(rates[a], rates[b], strict=True)]) for name, (a, b) in pairs.items()
        },
    }


def packings(adapter: Adapter, prompt: Prompt, repeats: int) -> dict[str, Any]:
    """Return rollouts per second of `choice` on 16 masks of a tenth of the tokens, by the tokens in one prefill."""
    engines = {size: Rollouts(adapter, prompt.inputs, Packing(adapter.model, size)) for size in SIZES}
    tokens = next(iter(engines.values())).encoded.videos[0].features.grid.num_tokens
    masks = bernoulli_masks(torch.full((tokens,), 0.1), 16, torch.Generator().manual_seed(0))
    rates: dict[str, list[float]] = {}
    for _ in range(repeats):
        for size, engine in engines.items():
            seconds = timed(lambda engine=engine: engine.option_logits(masks, prompt.option_ids))
            rates.setdefault(str(size), []).append(len(masks) / seconds)
    return {size: spread(values) for size, values in rates.items()}


def agreement(questions: int) -> dict[str, Any]:
    """Return how often the best option and the generated answer agree on the testbed's questions.

    "answer": the generated first word is the option of the highest logit; "reward": both are right or both wrong.
    """
    model, processor = load_model("testbed")
    prompts = ScenePrompts(adapter_for(model), processor, seed=SEED)
    policy = vidsieve.load("cacovid", policy="testbed", retention=0.1)
    conditions: dict[str, Compressor | None] = {"all tokens": None, "10 % by cacovid": policy}
    results: dict[str, Any] = {}
    for name, method in conditions.items():
        counts: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        odd: Counter[str] = Counter()
        for number in range(questions):
            block, place = divmod(number, 32 * prompts.per_scene)
            scene = block * 32 + place % 32
            questions_of_scene = make_questions(make_cast("dense", SEED, scene), SEED, scene)
            question = questions_of_scene[(place // 32) % len(questions_of_scene)]
            sample = prompts.choice(number)
            rollouts = Rollouts(prompts.adapter, sample.inputs)
            mask = torch.ones(1, rollouts.encoded.videos[0].features.grid.num_tokens, dtype=torch.bool)
            if method is not None:
                kept = method.compress(rollouts.video(frozenset({Need.QUESTION}))).indices
                mask = torch.zeros_like(mask).index_fill(1, kept, True)
            best = int(rollouts.option_logits(mask, sample.option_ids).argmax())
            (text,) = processor.tokenizer.batch_decode(rollouts.generate(mask, ANSWER), skip_special_tokens=True)
            same = bool(judge(sample.kind, text, question.options[best]))
            right = bool(judge(sample.kind, text, sample.truth))
            counts["answer"] += same
            counts["reward"] += right == (best == sample.answer)
            counts["right by choice"] += best == sample.answer
            counts["right by generate"] += right
            kinds[question.kind] += 1
            if not same:
                inside = text.split()[:1] and text.split()[0] in question.options
                odd[f"{question.kind}, said {'another option' if inside else 'a word that is no option'}"] += 1
        results[name] = {"questions": questions} | {what: counts[what] / questions for what in counts}
        results[name] |= {"kinds": dict(kinds), "disagreements": dict(odd)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/rollouts.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    result: dict[str, Any] = {"machine": machine()}
    for name, make, steps in (("testbed", testbed_prompts, (ANSWER,)), ("larger", larger_prompts, (2, ANSWER))):
        adapter, tokenizer, prompts = make()
        result[name] = speed(adapter, tokenizer, prompts, steps, options.repeats)
        result[name]["choice_by_tokens_a_prefill"] = packings(adapter, next(prompts), 2)
        for pair, times in result[name]["times"].items():
            print(f"{name:8s} {pair:62s} {times['min']:6.1f} {times['median']:6.1f} {times['max']:6.1f} times")
    result["agreement"] = agreement(options.questions)
    for name, row in result["agreement"].items():
        print(f"{name}: answer {row['answer']:.4f}, reward {row['reward']:.4f}; {row['disagreements']}")
    write_result(options.json, result)


if __name__ == "__main__":
    main()
