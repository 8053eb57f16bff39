"""The stages of the language model's training, and the loop that runs one of them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidsieve.io.checkpoints import load_state, save_state
from vidsieve.testbed.questions import KINDS
from vidsieve.testbed.world import TOKENS
from workbench.testbed.language import (
    Block,
    Scenes,
    accuracy,
    answerable,
    caption_block,
    caption_loss,
    choose_tokens,
    run_blocks,
    weighted_loss,
)

_SAVE_EVERY = 250


@dataclass(frozen=True)
class TrainingStage:
    """One stage of the curriculum.

    Parameters
    ----------
    kinds : questions asked
    fewest, most : int
        Kept tokens of a step, drawn log-uniformly.
    steps, batch, questions : int
    lr, last_lr : float
    weights : dict
        How often a kind is asked, relative to the others.
    random_share : float
        Share of videos whose tokens are drawn uniformly instead of towards what is asked.
    caption_share, conversation_share : float
        Share of steps that write captions, or that chain their questions as turns.
    enough : float
        Stop early when every kind is answered this well.
    sequence : int
        Longest sequence at full batch; longer ones run with fewer videos.
    """

    name: str
    kinds: Sequence[str]
    fewest: int
    most: int
    steps: int
    batch: int = 32
    questions: int = 6
    lr: float = 1e-3
    last_lr: float = 1e-3
    weights: dict[str, float] = field(default_factory=dict)
    random_share: float = 0.0
    caption_share: float = 0.0
    conversation_share: float = 0.0
    enough: float = 1.1
    sequence: int = 10_000
    evaluate_at: int = 40
    every: int = 100


CURRICULUM = (
    TrainingStage("C0a", ("colour", "shape"), 8, 12, 1500, enough=0.97, evaluate_at=12),
    TrainingStage(
        "C0b", ("colour", "shape", "place"), 8, 20, 1500, weights={"place": 4.0}, enough=0.97, evaluate_at=16
    ),
    TrainingStage(
        "C1",
        KINDS,
        16,
        64,
        4000,
        batch=24,
        questions=8,
        last_lr=5e-4,
        random_share=0.1,
        caption_share=0.15,
        weights={"order": 2.0, "motion": 3.0, "change": 3.0},
        enough=0.95,
        every=250,
    ),
    TrainingStage(
        "C2",
        KINDS,
        12,
        TOKENS,
        1500,
        batch=24,
        questions=8,
        lr=5e-4,
        last_lr=5e-5,
        random_share=0.3,
        caption_share=0.15,
        conversation_share=0.1,
        weights={"order": 1.5, "motion": 1.5, "change": 1.5},
        sequence=220,
        evaluate_at=TOKENS,
        every=250,
    ),
)


def _batch(
    stage: TrainingStage, scenes: Scenes, draw: np.random.Generator
) -> tuple[Tensor, Tensor, list[list[Block]], bool]:
    """Return one step's kept tokens, their indices, the blocks, and whether they are a conversation."""
    count = int(np.exp(draw.uniform(math.log(stage.fewest), math.log(stage.most + 0.999))))
    captions = draw.random() < stage.caption_share
    if captions:
        count = min(TOKENS, max(count, 60))
    text = 140 if captions else 12 * stage.questions
    batch = max(2, round(stage.batch * min(1.0, stage.sequence / (count + text))))
    picked = draw.integers(0, len(scenes.questions), batch)
    rows: list[np.ndarray[Any, Any]] = []
    blocks: list[list[Block]] = []
    for scene in picked.tolist():
        questions = scenes.questions[scene]
        candidates = [i for i, q in enumerate(questions) if q.kind in stage.kinds]
        keys = [math.log(stage.weights.get(questions[i].kind, 1.0)) + draw.gumbel() for i in candidates]
        order = [candidates[i] for i in np.argsort(keys)[::-1]]
        by_chance = draw.random() < stage.random_share and count < TOKENS and (not captions or count > TOKENS // 2)
        if by_chance:
            tokens = np.sort(draw.permutation(TOKENS)[:count])
            order.sort(key=lambda i: not answerable(questions[i], tokens))
        elif captions:
            tokens = choose_tokens(scenes, scene, range(len(questions)), count, draw)
        else:
            tokens = choose_tokens(scenes, scene, order[: stage.questions], count, draw)
        chosen = (order * stage.questions)[: stage.questions]
        rows.append(tokens)
        blocks.append(
            [caption_block(scenes, scene)] if captions else [(questions[i].ids, [questions[i].answer]) for i in chosen]
        )
    index = torch.from_numpy(np.stack(rows))
    video = scenes.tokens[torch.from_numpy(picked)[:, None], index].float()
    return video, index, blocks, not captions and draw.random() < stage.conversation_share


def run_stage(
    model: Any,
    stage: TrainingStage,
    scenes: Scenes,
    held: Scenes,
    seed: int,
    checkpoint: Path,
    log: Callable[[str], None],
    frozen: Sequence[int] = (),
) -> dict[str, float]:
    """Train the language model through one stage, from `checkpoint` if it was begun.

    The vectors of the words `frozen` stay as they are.

    Returns
    -------
    dict
        Held-out accuracy of every kind of question, and the minutes of all sittings.
    """
    parameters = [p.requires_grad_(True) for p in (*model.model.language_model.parameters(), model.model.image_newline)]
    vectors = model.get_input_embeddings().weight
    kept = vectors.detach()[list(frozen)].clone()
    optimizer = torch.optim.AdamW(parameters, stage.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    begun = load_state(checkpoint, {"model": model}, optimizer) if os.path.exists(checkpoint) else {}
    smooth = float(begun.get("loss", math.nan))
    started = time.perf_counter() - 60 * float(begun.get("minutes", 0.0))
    scores: dict[str, float] = {}
    model.train()
    for step in range(int(begun.get("step", 0)), stage.steps):
        rate = stage.lr + (stage.last_lr - stage.lr) * step / stage.steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50)
        draw = np.random.default_rng([seed, sum(map(ord, stage.name)), step])
        video, index, blocks, conversation = _batch(stage, scenes, draw)
        loss = weighted_loss(model, *run_blocks(model, video, index, blocks, conversation))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            vectors[list(frozen)] = kept
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        last = step + 1 == stage.steps
        if (step + 1) % stage.every == 0 or last:
            model.eval()
            scores = accuracy(model, held, stage.evaluate_at, stage.kinds)
            words = "  ".join(f"{kind} {value:.3f}" for kind, value in scores.items())
            if stage.caption_share:
                words += f"  caption {caption_loss(model, held, max(100, stage.evaluate_at)):.3f}"
            log(f"{stage.name} {step + 1}/{stage.steps}  loss {smooth:.3f}  {words}")
            model.train()
        done = last or (bool(scores) and min(scores.values()) > stage.enough)
        if (step + 1) % _SAVE_EVERY == 0 or done:
            minutes = (time.perf_counter() - started) / 60
            save_state(checkpoint, {"model": model}, optimizer, {"step": step + 1, "loss": smooth, "minutes": minutes})
        if done:
            break
    model.eval()
    return scores | {"minutes": (time.perf_counter() - started) / 60}
