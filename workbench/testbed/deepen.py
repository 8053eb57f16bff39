"""The deep model from the shallow one: two sliding-window layers in front, and new vectors for question words.

In the shallow model the LLM's first layer already matches the question's words with the video. In large models that
happens many layers later. Here the first two layers cannot look from the words to the video, because their window is
eight tokens long; they translate the new vectors of the question's words into the old ones, which the third layer
knows. So nothing before the LLM's third layer tells which tokens a question is about.

Stage P teaches the two layers to translate. Stage T is the curriculum's last stage again, end to end.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from vidsieve.testbed.model import WORD_ID
from vidsieve.testbed.questions import KINDS
from vidsieve.testbed.vocabulary import QUESTION_NAME
from vidsieve.testbed.world import TOKENS
from workbench.testbed.curriculum import CURRICULUM
from workbench.testbed.language import Scenes, accuracy

FRONT = 2
WINDOW = 8
WORDS, VIDEO = 10, 14
"""Words and video tokens in a sequence of stage P."""
STAGE_T = replace(CURRICULUM[-1], name="T", steps=150, lr=3e-4, last_lr=3e-5, fewest=16)


@dataclass(frozen=True)
class TranslationRecipe:
    """Stage P: steps, sequences a step, and the learning rate that falls to zero."""

    steps: int = 500
    batch: int = 24
    lr: float = 2e-3


def question_words() -> list[int]:
    """Return the ids of the words that only questions use, in order."""
    return sorted({WORD_ID[word] for name in QUESTION_NAME.values() for word in name.split()})


def deepened(shallow: Any, seed: int) -> tuple[Any, Tensor]:
    """Return the deep model before its training, which computes what the shallow one does, and the words' old vectors.

    The new layers add nothing yet. The vectors of `question_words` are drawn anew, so questions are not understood.
    """
    config = copy.deepcopy(shallow.config)
    text = config.text_config
    text.num_hidden_layers += FRONT
    text.use_sliding_window, text.sliding_window, text.max_window_layers = True, WINDOW, 0
    text.layer_types = ["sliding_attention"] * FRONT + ["full_attention"] * (text.num_hidden_layers - FRONT)
    draw = torch.Generator().manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config).float().eval()
    old, new = shallow.state_dict(), model.state_dict()
    for name, tensor in new.items():
        layer = re.search(r"language_model\.layers\.(\d+)\.", name)
        if layer is None:
            new[name] = old[name]
        elif int(layer[1]) >= FRONT:
            new[name] = old[name.replace(f"layers.{layer[1]}.", f"layers.{int(layer[1]) - FRONT}.")]
        elif name.endswith("norm.weight"):
            new[name] = torch.ones_like(tensor)
        elif name.endswith(("bias", "o_proj.weight", "down_proj.weight")):
            new[name] = torch.zeros_like(tensor)
        else:
            new[name] = 0.05 * torch.randn(tensor.shape, generator=draw)
    model.load_state_dict(new)
    model.tie_weights()
    model.generation_config = copy.deepcopy(shallow.generation_config)
    vectors = model.get_input_embeddings().weight
    words = question_words()
    with torch.no_grad():
        before = vectors[words].clone()
        fresh = torch.randn(before.shape, generator=draw)
        vectors[words] = fresh / fresh.norm(dim=1, keepdim=True) * before.norm(dim=1).median()
    return model.requires_grad_(False), before


def train_translation(
    model: Any,
    before: Tensor,
    scenes: Scenes,
    held: Scenes,
    recipe: TranslationRecipe,
    seed: int,
    log: Callable[[str], None],
) -> dict[str, float]:
    """Train the front layers to give words their old vectors (W, D) and video tokens their own: stage P.

    Returns
    -------
    dict
        The relative squared error of the last steps, and the accuracy of every kind of question under all tokens.
    """
    language = model.model.language_model
    front = language.layers[:FRONT]
    parameters = [parameter.requires_grad_(True) for parameter in front.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    now = model.get_input_embeddings().weight.detach()
    then = now.clone()
    then[question_words()] = before
    place = torch.arange(VIDEO + WORDS)
    near = (place[:, None] >= place) & (place[:, None] - place < WINDOW)
    error = 0.0
    for step in range(recipe.steps):
        draw = np.random.default_rng([seed, 16, step])
        read, wanted, positions = [], [], []
        for scene in draw.integers(0, len(scenes.questions), recipe.batch):
            asked = scenes.questions[scene]
            ids = asked[int(draw.integers(len(asked)))].ids[:WORDS]
            words = torch.tensor(ids + [0] * (WORDS - len(ids)))
            tokens = torch.from_numpy(np.sort(draw.permutation(TOKENS)[:VIDEO]))
            video = scenes.tokens[scene, tokens].float()
            read.append(torch.cat([video, now[words]]))
            wanted.append(torch.cat([video, then[words]]))
            positions.append(torch.cat([2 + tokens, TOKENS + 3 + torch.arange(WORDS)]))
        hidden, target, at = torch.stack(read), torch.stack(wanted), torch.stack(positions)
        rotary = language.rotary_emb(hidden, at)
        mask = near.expand(len(hidden), 1, -1, -1)
        for layer in front:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=at)
        loss = (hidden - target).square().sum(-1).mean() / target.square().sum(-1).mean()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / 30) * (1 - step / recipe.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        error = loss.item()
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            log(f"P {step + 1}/{recipe.steps}  relative error {error:.2e}")
    model.requires_grad_(False)
    return {"error": error, **accuracy(model, held, TOKENS, KINDS)}
