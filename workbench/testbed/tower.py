"""Stages V and A of the testbed's recipe: the vision tower on dense labels, the projector onto word embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vidsieve.testbed.model import WORD_ID
from vidsieve.testbed.vocabulary import COLOURS, COLUMNS, FIXTURES, GLYPHS, PLACES, ROWS, SHAPES
from vidsieve.testbed.world import FRAMES, GRID, SIDE, Cast, make_cast, render

CELLS = GRID * GRID
LOOKS = ("ground", "decoy", *SHAPES, *FIXTURES, *GLYPHS)
_LOOK_ID = {word: i for i, word in enumerate(LOOKS)}
_COLOUR_ID = {word: i + 1 for i, word in enumerate(COLOURS)}
Log = Callable[[str], None]


def dense_labels(cast: Cast) -> NDArray[np.int64]:
    """Return (2, 16, 36) int64: what each token shows (index into `LOOKS`), and its colour (0 = none)."""
    labels = np.zeros((2, FRAMES, GRID, GRID), np.int64)
    for cell in cast.decoys:
        labels[(0, *cell)] = _LOOK_ID["decoy"]
    for thing in cast.objects:
        for t, row, column in thing.track:
            labels[:, t, row, column] = _LOOK_ID[thing.shape], _COLOUR_ID[thing.colour_at(t)]
    return labels.reshape(2, FRAMES, CELLS)


def appearance(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the mean colours (…, 36, 12) of each token's four patches, in about [-1, 1]."""
    half = SIDE // GRID // 2
    lead = frames.shape[:-3]
    parts = frames.reshape(*lead, GRID, 2, half, GRID, 2, half, 3).mean(axis=(-5, -2))
    parts = np.moveaxis(parts, -3, -4)  # (…, rows, columns, 2, 2, 3) of quarters
    return np.asarray(parts.reshape(*lead, CELLS, 12) / 127.5 - 1, np.float32)


def _scene(task: tuple[str, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    world, seed, index = task
    cast = make_cast(world, seed, index)
    return render(cast, seed, index), dense_labels(cast)


def rendered(
    world: str, seed: int, count: int, workers: int = 2, work: Callable[[tuple[str, int, int]], Any] = _scene
) -> Iterator[Any]:
    """Yield `work((world, seed, i))` for scenes 0 … count−1 in order, computed by `workers` processes if many."""
    tasks = [(world, seed, index) for index in range(count)]
    if workers < 2 or count <= 64:  # a few take less time than processes need to start
        yield from map(work, tasks)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(work, tasks, chunksize=8)


def to_pixels(frames: NDArray[np.uint8]) -> Tensor:
    """Return (n, 3, 144, 144) float32 as the testbed's processor makes them."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def pool_patches(patches: Tensor) -> Tensor:
    """Return (n, 36, D) tokens of (n, 144, D) patches: means of 2×2, as LLaVA-OneVision pools them."""
    width = patches.shape[-1]
    return patches.reshape(-1, GRID, 2, GRID, 2, width).mean(dim=(2, 4)).flatten(1, 2)


@dataclass(frozen=True)
class TowerRecipe:
    """Stage V."""

    scenes: int = 900
    steps: int = 3600
    frames_per_step: int = 24
    lr: float = 2e-3


class DenseHeads(nn.Module):
    """Linear read-outs of look, colour, row, column and appearance; used in training only."""

    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(LOOKS), len(COLOURS) + 1, GRID, GRID, 12]
        self.read = nn.Linear(width, sum(self.sizes))
        self.register_buffer("weight", torch.tensor([0.3, 0.3] + [1.0] * (len(LOOKS) - 2)))

    def loss(self, features: Tensor, labels: Tensor, colours: Tensor) -> Tensor:
        """Return the weighted loss of tokens (n, 36, D) with labels (n, 2, 36) and appearance (n, 36, 12)."""
        look, colour, row, column, mean = self.read(features).split(self.sizes, -1)
        cell = torch.arange(CELLS).expand(len(labels), -1)
        total = F.cross_entropy(look.flatten(0, 1), labels[:, 0].flatten(), weight=self.weight)
        for logits, wanted, weight in (
            (colour, labels[:, 1], 0.5),
            (row, cell // GRID, 0.1),
            (column, cell % GRID, 0.1),
        ):
            total = total + weight * F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        return total + 0.5 * F.mse_loss(mean, colours)

    def accuracy(self, features: Tensor, labels: Tensor) -> tuple[float, float]:
        """Return the share of object tokens whose look, and whose colour, is read rightly."""
        look, colour = self.read(features).split(self.sizes, -1)[:2]
        objects = labels[:, 0] > 1
        right = [(guess.argmax(-1) == labels[:, i])[objects].float().mean() for i, guess in enumerate((look, colour))]
        return float(right[0]), float(right[1])


def train_tower(model: Any, recipe: TowerRecipe, seed: int, log: Log) -> dict[str, float]:
    """Train the vision tower on single frames of the dense world, each patch and each token on its dense labels.

    Returns
    -------
    dict
        ``look`` and ``colour``: accuracy on object tokens of held-out scenes.
    """
    frames, labels = _frames(seed, recipe.scenes)
    held_frames, held_labels = _frames(seed + 1, 30)
    tower, draw = model.model.vision_tower.train(), np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    heads = DenseHeads(model.config.vision_config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    figures = {}
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        picked = np.sort(draw.integers(0, len(frames), recipe.frames_per_step))
        patches = encode(tower, frames[picked])
        target, colours = torch.from_numpy(labels[picked]), torch.from_numpy(appearance(frames[picked]))
        quarters = patches.reshape(-1, GRID, 2, GRID, 2, patches.shape[-1]).permute(0, 2, 4, 1, 3, 5)
        every_patch = quarters.reshape(-1, CELLS, patches.shape[-1])
        loss = heads.loss(every_patch, target.repeat_interleave(4, 0), colours.repeat_interleave(4, 0))
        loss = loss + 0.5 * heads.loss(pool_patches(patches), target, colours)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 400 == 0 or step + 1 == recipe.steps:
            tower.eval()
            with torch.no_grad():
                tokens = pool_patches(torch.cat([encode(tower, held_frames[i : i + 48]) for i in range(0, 480, 48)]))
            look, colour = heads.accuracy(tokens, torch.from_numpy(held_labels[:480]))
            figures = {"look": look, "colour": colour}
            log(f"V {step + 1}/{recipe.steps}  loss {loss.item():.3f}  look {look:.4f}  colour {colour:.4f}")
            tower.train()
    tower.eval()
    return figures


def encode(tower: Any, frames: NDArray[np.uint8]) -> Tensor:
    """Return patch features (n, 144, D_v) of frames (n, 144, 144, 3)."""
    hidden: Tensor = tower(pixel_values=to_pixels(frames), output_hidden_states=True).hidden_states[-1]
    return hidden


def _frames(seed: int, scenes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    frames = np.empty((scenes * FRAMES, SIDE, SIDE, 3), np.uint8)
    labels = np.empty((scenes * FRAMES, 2, CELLS), np.int64)
    for index, (video, dense) in enumerate(rendered("dense", seed, scenes)):
        frames[index * FRAMES : (index + 1) * FRAMES] = video
        labels[index * FRAMES : (index + 1) * FRAMES] = dense.transpose(1, 0, 2)
    return frames, labels


@dataclass(frozen=True)
class ProjectorRecipe:
    """Stage A."""

    scenes: int = 300
    steps: int = 1200
    frames_per_step: int = 32
    lr: float = 3e-3
    init_std: float = 0.05


def train_projector(model: Any, recipe: ProjectorRecipe, seed: int, log: Log) -> dict[str, float]:
    """Draw the word embeddings, then map each token to the words of what it shows.

    Objects: E[shape] + E[colour]; decoys and ground: their word and a fixed random code of their appearance,
    so that they stay as different from each other as they look; everything: quarter, row and column. The
    other LLM matrices start at N(0, `init_std`): the library's 0.02 is too small at this width.

    Returns
    -------
    dict
        ``look`` and ``colour``: object tokens whose nearest word is right.
    """
    draw, noise = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)
    language, width = model.model.language_model, model.config.text_config.hidden_size
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if parameter.ndim == 2:
                std = width**-0.5 if "embed" in name else recipe.init_std
                parameter.normal_(0, std, generator=noise)
    words: Tensor = model.get_input_embeddings().weight.detach()

    def embedding(names: tuple[str, ...]) -> Tensor:
        return words[torch.tensor([WORD_ID[name] for name in names])]

    looks, colours = embedding(LOOKS), torch.cat([torch.zeros(1, width), embedding(COLOURS)])
    looks[:2] *= 0.5  # what they look like tells ground and decoys apart, more than their word
    code = torch.randn(12, width, generator=noise) * (3.0 / (12 * width) ** 0.5)
    cell = torch.arange(CELLS)
    quarter = 2 * (cell // GRID >= GRID // 2).long() + (cell % GRID >= GRID // 2).long()
    place = embedding(PLACES)[quarter] + 0.5 * (embedding(ROWS)[cell // GRID] + embedding(COLUMNS)[cell % GRID])

    frames, labels = _frames(seed + 2, recipe.scenes)
    with torch.no_grad():
        patches = torch.cat([encode(model.model.vision_tower, frames[i : i + 96]) for i in range(0, len(frames), 96)])
    projector = model.model.multi_modal_projector.train()
    optimizer = torch.optim.AdamW(projector.parameters(), recipe.lr, weight_decay=0.01, fused=True)
    figures = {}
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        picked = draw.integers(0, len(frames), recipe.frames_per_step)
        target = torch.from_numpy(labels[picked])
        plain = (target[:, 0] <= 1)[..., None]
        wanted = looks[target[:, 0]] + colours[target[:, 1]] + place
        wanted = wanted + plain * (torch.from_numpy(appearance(frames[picked])) @ code)
        tokens = pool_patches(projector(patches[torch.from_numpy(picked)]))
        loss = F.mse_loss(tokens, wanted) * width
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 300 == 0 or step + 1 == recipe.steps:
            objects = target[:, 0] > 1
            rest = tokens.detach() - place
            right = [
                ((rest @ table.T).argmax(-1) == target[:, i])[objects].float().mean()
                for i, table in enumerate((looks, colours))
            ]
            figures = {"look": float(right[0]), "colour": float(right[1])}
            log(f"A {step + 1}/{recipe.steps}  mse {loss.item():.3f}  look {right[0]:.4f}  colour {right[1]:.4f}")
    projector.eval()
    return figures
