"""Stages C of the testbed's recipe: the language model learns to answer from few tokens, then from many.

Vision tower and projector are frozen by now, so each scene is 576 ready tokens. A training sequence is one
video prefix and several questions: either each sees the prefix and itself only, at positions that start
again, or they follow each other as the turns of one conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vidsieve.testbed.model import WORD_ID
from vidsieve.testbed.questions import CAPTION_PROMPT, KINDS, make_caption, make_questions
from vidsieve.testbed.world import FRAMES, TOKENS, Cast, SceneObject, make_cast, render
from workbench.testbed.tower import encode, pool_patches, rendered

_START, _END = WORD_ID["<|im_start|>"], WORD_ID["<|im_end|>"]
_USER, _ASSISTANT = WORD_ID["user"], WORD_ID["assistant"]
_PREFIX_END = 2 + TOKENS + 1
Generator = np.random.Generator


def words(text: str) -> list[int]:
    """Return the ids of a text's words."""
    return [WORD_ID[word] for word in text.split()]


@dataclass(frozen=True)
class TokenizedQuestion:
    """A question as ids, its options and answer, and groups of tokens of which one each is needed to answer."""

    kind: str
    ids: list[int]
    options: list[int]
    answer: int
    needed: list[tuple[int, ...]]


@dataclass
class Scenes:
    """Ready scenes: tokens (n, 576, D) float16, and per scene its questions, caption and token weights."""

    tokens: Tensor
    questions: list[list[TokenizedQuestion]]
    captions: list[list[int]]
    weights: list[NDArray[np.float64]] = field(default_factory=list)


def needed_tokens(kind: str, targets: Sequence[int], cast: Cast) -> list[tuple[int, ...]]:
    """Return groups of tokens of which one each is needed to answer a question of a kind about `targets`."""
    about = set(targets)
    if kind == "order":
        return [o.tokens() for o in cast.objects if o.kind == "flash" and set(o.tokens()) <= about]
    if kind == "motion":
        return [tuple(targets[:2]), tuple(targets[2:])]
    if kind == "change":
        thing: SceneObject = next(o for o in cast.objects if o.turned)
        frames = thing.turned[1] if thing.turned else ()
        turned = tuple(thing.tokens()[t] for t in frames)
        return [turned, tuple(token for token in thing.tokens() if token not in turned)]
    return [tuple(targets)]


Described = tuple[NDArray[np.uint8], list[TokenizedQuestion], list[int], NDArray[np.float64]]
"""A scene's frames, questions, caption and token weights."""


def _describe(task: tuple[str, int, int]) -> Described:
    """Return one scene's frames, questions, caption and token weights."""
    world, seed, index = task
    cast = make_cast(world, seed, index)
    ready = [WORD_ID["<|im_end|>"], _START, _ASSISTANT]
    asked = [
        TokenizedQuestion(
            q.kind,
            words(q.text) + ready,
            [WORD_ID[o] for o in q.options],
            WORD_ID[q.answer],
            needed_tokens(q.kind, q.targets, cast),
        )
        for q in make_questions(cast, seed, index)
    ]
    weights = np.full(TOKENS, 0.4)
    for thing in cast.objects:
        weights[list(thing.tokens())] = 1.0 if thing.kind == "glyph" else 2.0
    for question in asked:
        for group in question.needed:
            weights[list(group)] = 8.0
    return render(cast, seed, index), asked, words(make_caption(cast)), weights


@torch.no_grad()
def prepare(
    model: Any,
    world: str,
    seed: int,
    count: int,
    progress: Callable[[int], None] | None = None,
    describe: Callable[[tuple[str, int, int]], Described] = _describe,
) -> Scenes:
    """Return `count` scenes through the frozen tower and projector; `describe` renders a scene and asks about it."""
    tokens = torch.empty(count, TOKENS, model.config.text_config.hidden_size, dtype=torch.float16)
    scenes = Scenes(tokens, [], [])
    for index, (frames, asked, caption, weights) in enumerate(rendered(world, seed, count, work=describe)):
        patches = encode(model.model.vision_tower, frames)
        tokens[index] = pool_patches(model.model.multi_modal_projector(patches)).reshape(FRAMES * 36, -1).half()
        scenes.questions.append(asked)
        scenes.captions.append(caption)
        scenes.weights.append(weights)
        if progress:
            progress(index + 1)
    return scenes


def choose_tokens(scenes: Scenes, scene: int, wanted: Sequence[int], count: int, draw: Generator) -> NDArray[np.int64]:
    """Return `count` sorted tokens that hold what the `wanted` questions need, the rest drawn towards objects."""
    if count >= TOKENS:
        return np.arange(TOKENS)
    keys = np.log(scenes.weights[scene]) + draw.gumbel(size=TOKENS)
    must = {int(draw.choice(group)) for number in wanted for group in scenes.questions[scene][number].needed}
    keys[list(must)[:count]] = np.inf
    return np.sort(np.argpartition(-keys, count - 1)[:count])


def answerable(question: TokenizedQuestion, tokens: NDArray[np.int64]) -> bool:
    """Return True if a set of tokens holds those that a question needs."""
    have = set(tokens.tolist())
    return all(have & set(group) for group in question.needed)


Block = tuple[list[int], list[int]]
"""Prompt ids after the video, and the answer's ids."""


def caption_block(scenes: Scenes, scene: int) -> Block:
    """Return the block that asks for a scene's caption."""
    return [*words(CAPTION_PROMPT), _END, _START, _ASSISTANT], scenes.captions[scene]


def run_blocks(
    model: Any, video: Tensor, tokens: Tensor, blocks: Sequence[Sequence[Block]], conversation: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (B, Q, L, D) of the blocks, their labels and loss weights (B, Q, L).

    Parameters
    ----------
    video : Tensor, (B, k, D), kept video tokens
    tokens : Tensor, (B, k), their raster indices
    blocks : B lists of Q blocks
    conversation : bool
        Turns of one conversation instead of questions that do not see each other.
    """
    embed = model.get_input_embeddings()
    batch, kept = tokens.shape
    count = len(blocks[0])
    opening = [_START, _USER] if conversation else []
    laid = [[([*(opening if j else []), *ask], answer) for j, (ask, answer) in enumerate(row)] for row in blocks]
    length = max(len(ask) + len(answer) + 1 for row in laid for ask, answer in row)
    ids = torch.zeros(batch, count, length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    weights = torch.zeros(batch, count, length)
    for b, row in enumerate(laid):
        for j, (ask, answer) in enumerate(row):
            whole = [*ask, *answer, _END]
            ids[b, j, : len(whole)] = torch.tensor(whole)
            span = slice(len(ask) - 1, len(whole) - 1)
            labels[b, j, span] = torch.tensor(whole[len(ask) :])
            weights[b, j, span] = 1.0
            weights[b, j, len(whole) - 2] = 0.1  # the end of the turn is easy
    start = embed(torch.tensor([_START, _USER])).expand(batch, -1, -1)
    newline = model.model.image_newline.expand(batch, 1, -1)
    x = torch.cat([start, video, newline, embed(ids.flatten(1))], 1)
    prefix = kept + 3
    whole_length = prefix + count * length
    before = torch.cat([torch.tensor([0, 1]).expand(batch, -1), 2 + tokens, torch.full((batch, 1), _PREFIX_END - 1)], 1)
    used = ids.ne(0)
    mask = torch.ones(whole_length, whole_length, dtype=torch.bool).tril()
    if conversation:
        after = _PREFIX_END - 1 + used.flatten(1).cumsum(1)
        visible = torch.cat([torch.ones(batch, prefix, dtype=torch.bool), used.flatten(1)], 1)
        attend = (mask & visible[:, None]) | torch.eye(whole_length, dtype=torch.bool)
    else:
        after = (_PREFIX_END + torch.arange(length)).repeat(count).expand(batch, -1)
        for j in range(count):
            mine = slice(prefix + j * length, prefix + (j + 1) * length)
            mask[mine, prefix : mine.start] = False
        attend = mask.expand(batch, -1, -1)
    hidden = model.model.language_model(
        inputs_embeds=x,
        position_ids=torch.cat([before, after], 1),
        attention_mask=_masks(model.config.text_config, attend, prefix, length, conversation),
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    return hidden.reshape(batch, count, length, -1), labels, weights


def _masks(text: Any, attend: Tensor, prefix: int, length: int, conversation: bool) -> dict[str, Tensor]:
    """Return the mask (B, 1, L, L) of each type of layer; a window counts the places that a block alone would have."""
    masks = {"full_attention": attend[:, None]}
    if text.sliding_window is not None:
        place = torch.arange(attend.shape[1])
        if not conversation:
            place = torch.where(place < prefix, place, prefix + (place - prefix) % length)
        masks["sliding_attention"] = (attend & (place[:, None] - place < text.sliding_window))[:, None]
    return masks


def weighted_loss(model: Any, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross-entropy over labelled places."""
    real = labels >= 0
    loss = F.cross_entropy(model.lm_head(hidden[real]), labels[real], reduction="none")
    return (loss * weights[real]).sum() / weights[real].sum()


@torch.no_grad()
def accuracy(model: Any, scenes: Scenes, count: int, kinds: Sequence[str] = KINDS, limit: int = 40) -> dict[str, float]:
    """Return the accuracy of each kind of question, with `count` tokens that hold what is needed."""
    draw, marks = np.random.default_rng(0), dict[str, list[bool]]()
    for scene in range(min(limit, len(scenes.questions))):
        numbers = [i for i, q in enumerate(scenes.questions[scene]) if q.kind in kinds]
        if not numbers:
            continue
        asked = [scenes.questions[scene][i] for i in numbers]
        tokens = torch.from_numpy(choose_tokens(scenes, scene, numbers, count, draw))
        video = scenes.tokens[scene, tokens][None].float()
        hidden, _, _ = run_blocks(model, video, tokens[None], [[(q.ids, [q.answer]) for q in asked]])
        for j, question in enumerate(asked):
            logits = model.lm_head(hidden[0, j, len(question.ids) - 1])[question.options]
            marks.setdefault(question.kind, []).append(question.options[int(logits.argmax())] == question.answer)
    return {kind: float(np.mean(marks[kind])) for kind in kinds if kind in marks}


@torch.no_grad()
def caption_loss(model: Any, scenes: Scenes, count: int, limit: int = 20) -> float:
    """Return the captions' cross-entropy per word, with `count` tokens that hold what they need."""
    draw, losses = np.random.default_rng(0), []
    for scene in range(min(limit, len(scenes.questions))):
        tokens = torch.from_numpy(choose_tokens(scenes, scene, range(len(scenes.questions[scene])), count, draw))
        video = scenes.tokens[scene, tokens][None].float()
        hidden, labels, weights = run_blocks(model, video, tokens[None], [[caption_block(scenes, scene)]])
        losses.append(float(weighted_loss(model, hidden, labels, (weights > 0.5).float())))
    return float(np.mean(losses))
