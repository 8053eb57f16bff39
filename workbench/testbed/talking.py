"""Counting, things that are not there, and the training of the model that answers about them.

The testbed's models have never been asked how many there are, nor about what is not in the video. One more goes on
from the shallow one and learns both, with its embeddings and its first layer as they were: policies for the shallow
one, which read nothing else of the LLM, serve it too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vidsieve._version import __version__
from vidsieve.io.checkpoints import load_state, save_state
from vidsieve.loading import shipped_model
from vidsieve.testbed.model import WORD_ID
from vidsieve.testbed.questions import KINDS, Question, best_order, make_caption, make_questions, place_of
from vidsieve.testbed.vocabulary import NUMBERS, QUESTION_NAME, SHAPES, TALK_WORDS, VOCABULARY
from vidsieve.testbed.world import TOKENS, WORLD_VERSION, Cast, SceneObject, make_cast, render, scene_rng
from workbench.testbed.curriculum import TrainingStage, run_stage
from workbench.testbed.language import TokenizedQuestion, needed_tokens, prepare, words
from workbench.testbed.model import TALK_ID, save_model

COUNTED, ABSENT = "count", "absent"
TALK_KINDS = (*KINDS, COUNTED, ABSENT)
TALKING = TrainingStage(
    "T",
    TALK_KINDS,
    12,
    TOKENS,
    2400,
    batch=24,
    questions=8,
    lr=5e-4,
    last_lr=5e-5,
    random_share=0.15,
    caption_share=0.1,
    conversation_share=0.2,
    weights={COUNTED: 2.0, ABSENT: 1.5, "order": 1.5, "motion": 1.5},
    sequence=220,
    evaluate_at=TOKENS,
    every=200,
)
_REMOVED = 2
NOTHING = NUMBERS[0]


def open_cast(world: str, seed: int, index: int) -> tuple[Cast, tuple[SceneObject, ...]]:
    """Return a scene without some of the objects that would be alone of their shape, and these objects."""
    cast = make_cast(world, seed, index)
    rng = scene_rng(world, seed, index, salt=3)
    lone = [o for o in cast.objects if o.kind == "flash" and o.shape in cast.unique_shapes]
    gone = tuple(lone[i] for i in sorted(rng.permutation(len(lone))[:_REMOVED].tolist()))
    return replace(cast, objects=tuple(o for o in cast.objects if o not in gone)), gone


def counting_questions(cast: Cast, seed: int, index: int) -> list[Question]:
    """Return how many objects of a shape flash, for every shape of which there are at most three."""
    found = []
    for shape in SHAPES:
        members = [o for o in cast.objects if o.kind in ("flash", "mover") and o.shape == shape]
        if len(members) < len(NUMBERS) and all(o.kind == "flash" for o in members):
            text = f"how many {QUESTION_NAME[shape]} are there ?"
            about = tuple(token for thing in members for token in thing.tokens())
            found.append(Question(COUNTED, text, NUMBERS, NUMBERS[len(members)], about))
    rng = scene_rng(cast.world, seed, index, salt=4)
    return [found[i] for i in rng.permutation(len(found))]


def absent_questions(cast: Cast, gone: tuple[SceneObject, ...], seed: int, index: int) -> list[Question]:
    """Return questions about objects that a scene has lost, and as many about objects it still has, in random order.

    The right answer to the first is `NOTHING`; their `targets` are empty.
    """
    rng = scene_rng(cast.world, seed, index, salt=5)
    found = []
    lone = [o for o in cast.objects if o.kind == "flash" and o.shape in cast.unique_shapes]
    for thing in (*gone, *(lone[i] for i in rng.permutation(len(lone))[: len(gone)])):
        there = thing not in gone
        about = best_order(thing) if there else ()
        for text, truth in (("what colour is the {} ?", thing.colour), ("where is the {} ?", place_of(thing))):
            answer = truth if there else NOTHING
            options = (answer, NOTHING, NOTHING, NOTHING)  # asked openly: any word may be said
            found.append(Question(ABSENT, text.format(QUESTION_NAME[thing.shape]), options, answer, about))
    return [found[i] for i in rng.permutation(len(found))]


def talk_ids(text: str) -> list[int]:
    """Return the ids of a text's words, those of `TALK_WORDS` among them."""
    return [TALK_ID[word] for word in text.split()]


def describe_open(
    task: tuple[str, int, int],
) -> tuple[NDArray[np.uint8], list[TokenizedQuestion], list[int], NDArray[np.float64]]:
    """Return a training scene's frames, questions of all kinds, caption and token weights."""
    world, seed, index = task
    cast, gone = open_cast(world, seed, index)
    ready = [WORD_ID["<|im_end|>"], WORD_ID["<|im_start|>"], WORD_ID["assistant"]]
    asked, weights = [], np.full(TOKENS, 0.4)
    for thing in cast.objects:
        weights[list(thing.tokens())] = 1.0 if thing.kind == "glyph" else 2.0
    new = [*counting_questions(cast, seed, index), *absent_questions(cast, gone, seed, index)]
    for q in (*make_questions(cast, seed, index), *new):
        if q.kind == COUNTED:
            needed = [o.tokens() for o in cast.objects if o.kind == "flash" and set(o.tokens()) <= set(q.targets)]
        else:
            needed = needed_tokens(q.kind, q.targets, cast) if q.targets else []
        for group in needed:
            weights[list(group)] = 8.0
        options = [TALK_ID[word] for word in (NUMBERS if q.kind == ABSENT else q.options)]
        if q.kind == ABSENT and q.targets:
            options = [TALK_ID[NOTHING], TALK_ID[q.answer]]
        asked.append(TokenizedQuestion(q.kind, talk_ids(q.text) + ready, options, TALK_ID[q.answer], needed))
    return render(cast, seed, index), asked, words(make_caption(cast)), weights


def enlarge(model: Any, seed: int) -> None:
    """Give a model rows for `TALK_WORDS`, as long as the others are, and freeze embeddings and first layer."""
    table = model.get_input_embeddings().weight.detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = torch.randn(len(TALK_WORDS), table.shape[1])
    fresh *= table.norm(dim=1).median() / fresh.norm(dim=1, keepdim=True)
    model.resize_token_embeddings(len(VOCABULARY) + len(TALK_WORDS), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[len(VOCABULARY) :] = fresh
    language: nn.Module = model.model.language_model
    for part in (model.get_input_embeddings(), language.get_submodule("layers.0")):
        part.requires_grad_(False)


def build_talker(
    folder: Path, *, seed: int, scenes: int, stage: TrainingStage = TALKING, log: Callable[[str], None]
) -> dict[str, Any]:
    """Go on from the shallow model until it counts and says what is not there; write it to ``folder/model``.

    A training that was stopped goes on from its last checkpoint in `folder`.

    Returns
    -------
    dict
        Seed, settings, minutes and held-out accuracies.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    from transformers import LlavaOnevisionForConditionalGeneration

    model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
        shipped_model("testbed:shallow"), dtype=torch.float32
    )
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    enlarge(model, seed)
    start = time.perf_counter()
    done = folder / "T.safetensors"
    if os.path.exists(done):
        figures = load_state(done, {"model": model})["stage"]
    else:
        log(f"rendering and encoding {scenes} scenes")
        train = prepare(model, "dense", seed + 10, scenes, describe=describe_open)
        held = prepare(model, "dense", seed + 11, min(60, scenes), describe=describe_open)
        begun = folder / "T.begun.safetensors"
        figures = run_stage(model, stage, train, held, seed, begun, log)
        save_state(done, {"model": model}, None, {"stage": figures})
        begun.unlink(missing_ok=True)
    record = {
        "seed": seed,
        "scenes": scenes,
        "figures": figures,
        "minutes": (time.perf_counter() - start) / 60,
        "vidsieve_version": __version__,
        "world_version": WORLD_VERSION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "goes_on_from": json.loads((shipped_model("testbed:shallow") / "testbed.json").read_text()),
    }
    save_model(model, folder / "model", record, words=(*VOCABULARY, *TALK_WORDS))
    return record
