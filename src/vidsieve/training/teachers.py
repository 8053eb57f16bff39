"""Scores that a frozen LLM's attention gives to video tokens: what a policy may be distilled from.

Teachers of the supervised warm-up and of the control without reinforcement learning; the question of CaCoVID's
Figure 1 is whether attention tells what an answer depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.decoder_layer import at_home, block_shape, rotated
from vidsieve.adapters.encoded import Encoded
from vidsieve.errors import NeedError
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.settings import Teacher


@torch.no_grad()
def teacher_scores(rollouts: Rollouts, teacher: Teacher) -> Tensor:
    """Return a teacher's scores (N,) float32 of a prompt's video tokens; their softmax is what a policy learns.

    ``"first_look"``: the strongest log-attention that any head of layer 0 pays a token from the words asked, or from
    the caption where the prompt has one. ``"attention"``: the logarithm of the mean attention, over layers and heads,
    from the last column of the prompt, or from the caption.
    """
    adapter, encoded = rollouts.adapter, rollouts.encoded
    labels = encoded.rest.get("labels")
    if teacher == "first_look":
        if labels is None:
            prompt = adapter.prompt(encoded, 0)
            real = encoded.attention_mask[0].nonzero().flatten()
            rows = real[prompt.question_mask.to(real.device)]
            if not len(rows):
                raise NeedError("the prompt asks nothing: the first look of layer 0 has no words to look from")
        else:
            rows = (labels[0] != -100).nonzero().flatten()
        weights = attention_rows(adapter, encoded, rows, [0])[0]  # (H, R, N)
        return weights.amax((0, 1)).clamp(min=1e-12).log()
    last = encoded.attention_mask[0].nonzero().flatten()[-1:]
    # The column before a caption's token predicts it.
    rows = last if labels is None else (labels[0] != -100).nonzero().flatten() - 1
    layers = attention_rows(adapter, encoded, rows, range(len(adapter.decoder_layers)))
    return torch.stack([weights.mean((0, 1)) for weights in layers]).mean(0).clamp(min=1e-12).log()


def attention_rows(adapter: Adapter, encoded: Encoded, rows: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Return the attention (H, R, N) float32 that columns `rows` (R,) pay the first video's tokens, per layer.

    Recomputed from each layer's own projections while the whole prompt runs through the LLM once: no full attention
    matrix, whatever the attention backend.
    """
    whole = adapter.build(encoded, encoded.per_row(encoded.everything()))
    kept = whole.kept_positions[0]  # padding is gone: columns of the prompt lie elsewhere in what runs
    place = torch.full((encoded.input_ids.shape[1],), -1, dtype=torch.int64, device=kept.device)
    place[kept] = torch.arange(len(kept), device=kept.device)
    asking, columns = place[rows.to(kept.device)], place[encoded.videos[0].columns.to(kept.device)]
    positions = encoded.positions[adapter.position_rows, 0][:, kept]
    found: list[Tensor] = []
    handles = []

    def reader(layer: Any) -> Any:
        def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = at_home(args[0] if args else kwargs["hidden_states"], layer)[0]
            shape = block_shape(adapter.model.config.get_text_config(), layer)
            x = layer.input_layernorm(hidden)
            at, asked = positions.to(x.device), asking.to(x.device)
            keys = rotated(layer.self_attn, "k", shape, x, at)
            keys = keys.repeat_interleave(shape.num_heads // shape.num_kv_heads, 0)
            queries = rotated(layer.self_attn, "q", shape, x[asked], at[:, asked])
            logits = queries @ keys.transpose(1, 2) * layer.self_attn.scaling  # (H, R, L)
            later = torch.arange(x.shape[0], device=x.device)[None] > asked[:, None]
            found.append(logits.masked_fill(later, -torch.inf).softmax(-1)[..., columns.to(x.device)])

        return read

    inputs = {key: value for key, value in whole.inputs.items() if key != "labels"}
    for number in layers:
        layer = adapter.decoder_layers[number]
        handles.append(layer.register_forward_pre_hook(reader(layer), with_kwargs=True))
    try:
        adapter.model(**inputs, logits_to_keep=1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
