"""Learning without reinforcement, the controls of the policy gradient: a teacher, straight-through, a soft top-k.

CaCoVID's Figure 1 asks if attention tells what an answer depends on. Straight-through: the kept tokens go into the LLM
times 1 + p − sg(p), which is 1, so that the gradient of the answer's loss reaches the keep probability p of each.

Soft top-k (VisionSelector): all tokens go into the LLM, times a mask between 0 and 1 whose sum is the budget. A second
loss, of growing weight, pulls the mask to 0 and 1, where it is what a selection does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.adapters import decoder_layer
from vidsieve.adapters.transformers_api import layer_hidden, window_of
from vidsieve.errors import NeedError
from vidsieve.selection import indices_to_mask, kept_tokens, mask_to_indices, top_indices
from vidsieve.training.rewards import caption_ce, label_span
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.settings import Teacher
from vidsieve.types import Selection, VideoTokens

CONSTRAINT = (0.1, 2.0)
"""Weight of `constraint_loss` at the first and at the last step, as in VisionSelector's release."""
UNLIKELY = -12.0
"""Log-score of a token that the oracle does not name."""


class _AllRead(Exception):
    """Leaves the LLM before the last layer to read has run; no fault."""


@torch.no_grad()
def teacher_scores(rollouts: Rollouts, teacher: Teacher, targets: Tensor | None = None) -> Tensor:
    """Return a teacher's scores (N,) float32 of a prompt's video tokens; the policy learns their softmax.

    ``"first_look"``: the strongest log-attention of any head of the first full-attention layer from the question's
    words, or from the caption where the prompt has one. ``"attention"``: the logarithm of the mean attention, over
    layers and heads, from the last column of the prompt, or from the caption. ``"oracle"``: 0 for `targets`, the tokens
    that the question is about, and `UNLIKELY` for the others.
    """
    adapter, encoded = rollouts.adapter, rollouts.encoded
    if teacher == "oracle":
        if targets is None:
            raise NeedError(
                "the teacher 'oracle' must be told which tokens a question is about, as the testbed's questions for "
                "cacovid tell: choose 'first_look' or 'attention'"
            )
        scores = torch.full((encoded.videos[0].features.grid.num_tokens,), UNLIKELY)
        scores[targets] = 0.0
        return scores.to(encoded.videos[0].features.embeds.device)
    real = encoded.attention_mask[0].nonzero().flatten()
    labels = encoded.rest.get("labels")
    if teacher == "first_look":
        if labels is None:
            rows = real[adapter.prompt(encoded, 0).question_mask.to(real.device)]
            if not len(rows):
                raise NeedError("the prompt has no question, whose words the teacher 'first_look' needs")
        else:
            rows = (labels[0] != -100).nonzero().flatten()
        weights = attention_rows(rollouts, rows, [adapter.first_full_layer])[0]  # (H, R, N)
        return weights.amax((0, 1)).clamp(min=1e-12).log()
    # The column before a caption's token predicts it.
    rows = real[-1:] if labels is None else (labels[0] != -100).nonzero().flatten() - 1
    layers = attention_rows(rollouts, rows, range(len(adapter.decoder_layers)))
    return torch.stack([weights.mean((0, 1)) for weights in layers]).mean(0).clamp(min=1e-12).log()


def attention_rows(rollouts: Rollouts, rows: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Return the attention (H, R, N) float32 from columns `rows` (R,) to the video's tokens, one tensor a layer.

    Recomputed from each layer's own projections while the whole prompt runs through the LLM once, up to the last of
    `layers`: no full attention matrix, whatever the attention backend.

    Raises
    ------
    NeedError
        If a layer, or the way it turns queries and keys by positions, is of a kind that we do not compute.
    """
    adapter, encoded = rollouts.adapter, rollouts.encoded
    for shape in {adapter.layer_shape(number) for number in layers}:  # most LLMs have one
        decoder_layer.check_rotary(adapter.rotary_embedding, shape)
    whole = encoded.everything()
    kept = rollouts.build(whole).kept_positions[0]  # without padding, columns of the prompt lie elsewhere
    place = torch.full((encoded.input_ids.shape[1],), -1, dtype=torch.int64, device=kept.device)
    place[kept] = torch.arange(len(kept), device=kept.device)
    asking, columns = place[rows.to(kept.device)], place[encoded.videos[0].columns.to(kept.device)]
    positions = encoded.positions[adapter.position_rows, 0][:, kept]
    text = adapter.model.config.get_text_config()
    attention: list[Tensor] = []

    def read(number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, window = layer_hidden(args, kwargs, layer)[0], window_of(text, number)
        weights = decoder_layer.attention_rows(layer, text, hidden, positions, asking, window)
        attention.append(weights[..., columns.to(weights.device)])
        if number == max(layers):
            raise _AllRead

    hooks = [adapter.decoder_layers[n].register_forward_pre_hook(partial(read, n), with_kwargs=True) for n in layers]
    try:
        with suppress(_AllRead):
            rollouts.prefill(whole)
    finally:
        for hook in hooks:
            hook.remove()
    return attention


def gated(video: VideoTokens, keep_logits: Tensor, keep_masks: Tensor) -> list[Selection]:
    """Return selections of keep-masks (G, N) through which a loss reaches the keep logits (N,)."""
    probability = keep_logits.float().sigmoid()
    gate = (1 + probability - probability.detach()).to(video.embeds)  # (N,), all ones
    kept = [mask_to_indices(mask).to(video.embeds.device) for mask in keep_masks]
    return [Selection(indices, embeds=video.embeds[indices] * gate[indices, None]) for indices in kept]


def shift_to_sum(scores: Tensor, total: float) -> Tensor:
    """Return the shift t, a scalar, with Σσ(s + t) = `total` for scores s (N,), by 64 bisections."""
    low, high = -scores.max() - 10, -scores.min() + 10
    for _ in range(64):  # the sum grows with the shift
        middle = (low + high) / 2
        above = (scores + middle).sigmoid().sum() >= total
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


class SoftTopK(torch.autograd.Function):
    """m = σ(s + t) of scores s (N,), with the t at which Σm is `count`.

    The gradient takes into account that t moves with s: v ⊙ g − v (v·g) / Σv, with v = m (1 − m).
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: int) -> Tensor:
        """Return the mask (N,)."""
        mask = (scores + shift_to_sum(scores, count)).sigmoid()
        ctx.save_for_backward(mask)
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient (N,) in the scores."""
        (mask,) = ctx.saved_tensors
        slope = mask * (1 - mask)
        pulled = slope * grads[0]
        # A mask of zeros and ones has no slope, and then no gradient.
        return pulled - slope * (pulled.sum() / slope.sum().clamp(min=torch.finfo(slope.dtype).tiny)), None


def soft_top_k(scores: Tensor, count: int) -> Tensor:
    """Return the soft mask (N,) of scores (N,): between 0 and 1, with sum `count` from 1 to N, and differentiable."""
    mask: Tensor = SoftTopK.apply(scores, count)
    return mask


def constraint_loss(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mean binary cross-entropy, a scalar, of a soft mask (N,) against the `count` highest scores (N,)."""
    return F.binary_cross_entropy(mask, indices_to_mask(top_indices(scores.detach(), count), len(mask)).to(mask))


def softly_selected(video: VideoTokens, scores: Tensor, ratio: float, progress: float) -> tuple[Selection, Tensor]:
    """Return all tokens times the soft mask of scores (N,), and the weighted `constraint_loss`, a scalar.

    Parameters
    ----------
    ratio : float
        Fraction of the tokens that is the sum of the mask.
    progress : float
        Fraction of the training that is done: the constraint's weight goes with it over `CONSTRAINT`.
    """
    count, scores = kept_tokens(ratio, video.num_tokens), scores.float()
    mask = soft_top_k(scores, count)
    first, last = CONSTRAINT
    constraint = (first + (last - first) * progress) * constraint_loss(mask, scores, count)
    indices = torch.arange(video.num_tokens, device=video.embeds.device)
    return Selection(indices, embeds=video.embeds * mask[:, None].to(video.embeds)), constraint


def choice_loss(
    rollouts: Rollouts, option_ids: Tensor, answer: int, selections: list[Selection]
) -> tuple[Tensor, Tensor]:
    """Return −log p(option `answer`), a scalar, and if each selection is answered by it (G,) float32."""
    logits = rollouts.prefill(selections)[0][:, -1]
    options = logits[:, option_ids.to(logits.device)].float()
    target = torch.full((len(selections),), answer, device=options.device)
    return F.cross_entropy(options, target), (options.detach().argmax(1) == answer).float()


def caption_loss(rollouts: Rollouts, selections: list[Selection]) -> Tensor:
    """Return the caption's mean cross-entropy (G,) under each selection, with its gradient."""
    span = label_span(rollouts.labels)
    logits, labels = rollouts.prefill(selections, span)
    return caption_ce(logits, labels[:, -span:])
