"""The masked reference: the whole prompt, dropped tokens hidden by a mask, positions unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded
from vidsieve.adapters.family import Videos
from vidsieve.adapters.transformers_api import FULL, eager_attention, layer_kinds
from vidsieve.compressors.inside import LayerCompressor
from vidsieve.testing.shortened import shortened_logits
from vidsieve.testing.staged import (
    Act,
    LayeredSelections,
    hidden_mask,
    layered_choice,
    masked_from,
    merging,
    visible_tokens,
)
from vidsieve.types import Selection


def shortens(adapter: Adapter) -> bool:
    """Whether a pruned run equals one on a shorter prompt, and not one in which dropped tokens are masked.

    True for families of definition "shortened", and where some layer of the LLM does not attend to all earlier tokens.
    """
    kinds = layer_kinds(adapter.model.config.get_text_config())
    return adapter.definition == "shortened" or any(kind != FULL for kind in kinds)


def reference_logits(
    adapter: Adapter,
    inputs: Mapping[str, Any],
    selections: Sequence[Selection],
    extra_ids: Tensor | None = None,
    videos: Videos = None,
    encoded: Encoded | None = None,
) -> Tensor:
    """Return the logits (B, L + E, V) of a full forward without cache in which dropped tokens are masked out.

    Where `shortens` it is `shortened_logits`, but for methods inside an LLM of a family of definition "masked", which
    may only cut behind its last such layer.

    Parameters
    ----------
    inputs : mapping
        Processor outputs of a batch, padding allowed.
    selections : one Selection per video, in placeholder order
        Merged tokens are placed at their anchors.
    extra_ids : Tensor, optional, (B, E), int64
        Tokens after the prompt.
    videos : as in `prune`
    encoded : Encoded, optional
        What `inputs` are encoded to, where that is known.
    """
    encoded = encoded or adapter.encode(inputs, videos)
    if adapter.definition == "shortened" or (shortens(adapter) and not isinstance(selections, LayeredSelections)):
        return shortened_logits(adapter, inputs, selections, extra_ids, encoded)
    if not isinstance(selections, LayeredSelections):
        return _through(adapter, encoded, selections, extra_ids, {}, {})
    length = encoded.input_ids.shape[1] + (0 if extra_ids is None else extra_ids.shape[1])
    embeds = encoded.videos[0].features.embeds
    masks, acts = {}, {}
    for layer, kept in selections.stages.items():
        masks[layer] = hidden_mask(visible_tokens(encoded, kept, length), embeds)
        acts[layer] = merging(encoded, selections, layer)
    return _through(adapter, encoded, selections.entering, extra_ids, masks, acts)


def chosen_inside(
    adapter: Adapter, inputs: Mapping[str, Any], compressor: LayerCompressor, videos: Videos = None
) -> LayeredSelections:
    """Return the selections of a method inside the LLM, from the model's own eager attention."""
    encoded = adapter.encode_for(inputs, compressor, videos)

    def run(entering: Sequence[Selection], masks: dict[int, Tensor], acts: Mapping[int, Act]) -> None:
        with torch.no_grad():
            _through(adapter, encoded, entering, None, masks, acts)

    return layered_choice(adapter, encoded, compressor, run)


def _through(
    adapter: Adapter,
    encoded: Encoded,
    selections: Sequence[Selection],
    extra_ids: Tensor | None,
    masks: dict[int, Tensor],
    acts: Mapping[int, Act],
) -> Tensor:
    """Return the logits of whole prompts in which only `selections` are visible from the first layer on."""
    model = adapter.model
    embeds = adapter.words(encoded.input_ids)
    for span, selection in zip(encoded.videos, selections, strict=True):
        tokens = span.features.embeds.clone()
        if selection.embeds is not None:
            tokens[selection.indices] = selection.embeds
        columns = torch.cat([span.columns, span.tail_columns])
        embeds[span.row, columns] = torch.cat([tokens, span.features.tail]).to(embeds)
    visible = visible_tokens(encoded, selections)
    for image in (*encoded.images, *adapter.sounds(encoded.input_ids, encoded.rest)):
        embeds[image.row, image.columns] = image.embeds.to(embeds)
    deep = _deep(encoded) if encoded.videos[0].features.deep else {}
    positions = encoded.positions
    if adapter.convention == "compact":
        positions = (visible.long().cumsum(1) - 1).clamp(min=0)[None]
    if extra_ids is not None and extra_ids.shape[1]:
        embeds = torch.cat([embeds, model.get_input_embeddings()(extra_ids)], 1)
        visible = torch.cat([visible, torch.ones_like(extra_ids, dtype=torch.bool)], 1)
        steps = torch.arange(1, extra_ids.shape[1] + 1, device=extra_ids.device)
        positions = torch.cat([positions, positions[..., -1:] + steps], -1)
    masks[0] = hidden_mask(visible, embeds)
    behind = (0, embeds.shape[1] - encoded.input_ids.shape[1])
    further = {name: F.pad(encoded.rest[name], behind) for name in adapter.column_keys}
    if deep:
        words = torch.zeros_like(visible[:, deep["visual_pos_masks"].shape[1] :])
        deep["visual_pos_masks"] = torch.cat([deep["visual_pos_masks"], words], 1)
    # A compiled model would not run the hooks that mask and act.
    with torch.compiler.set_stance("force_eager"), masked_from(adapter, masks, acts):
        hidden = adapter.language_model(
            inputs_embeds=embeds,
            position_ids=adapter.pack_positions(positions),
            attention_mask=masks[0],
            use_cache=False,
            **deep,
            **further,
        ).last_hidden_state
    return adapter.logits(hidden)


def attended(adapter: Adapter, inputs: Mapping[str, Any], layer: int, videos: Videos = None) -> list[Tensor]:
    """Return the attention (H, N) of each video's tokens from the last prompt token, by the model's own eager code.

    The weights are those of `layer` over the whole prompt.
    """
    model, encoded = adapter.model, adapter.encode(inputs, videos)
    layer_weights: list[Tensor] = []
    # Of this layer only: the weights of all layers would not fit for a long prompt.
    attention: Any = adapter.decoder_layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: layer_weights.append(output[1]))
    try:
        with eager_attention(model):
            whole = adapter.build(encoded, encoded.per_row(encoded.everything()))
            model(**whole.inputs, logits_to_keep=1)
    finally:
        hook.remove()
    weights, kept = layer_weights[0], whole.kept_positions
    return [weights[v.row, :, -1][:, torch.searchsorted(kept[v.row], v.columns.contiguous())] for v in encoded.videos]


def _deep(encoded: Encoded) -> dict[str, Any]:
    """Return the inputs of Qwen3-VL's language model for deepstack: the visual mask, and each layer's features."""
    spans = [(v.row, v.columns, v.features.deep) for v in encoded.videos]
    spans += [(i.row, i.columns, i.deep) for i in encoded.images]
    where = torch.zeros_like(encoded.attention_mask)
    layers = [
        torch.zeros(*where.shape, layer.shape[1], dtype=layer.dtype, device=layer.device) for layer in spans[0][2]
    ]
    for row, columns, deep in spans:
        where[row, columns] = True
        for layer, values in zip(layers, deep, strict=True):
            layer[row, columns] = values
    return {"visual_pos_masks": where, "deepstack_visual_embeds": [layer[where] for layer in layers]}


def reference_greedy(
    adapter: Adapter,
    inputs: Mapping[str, Any],
    selections: Sequence[Selection],
    steps: int,
    videos: Videos = None,
    extra_ids: Tensor | None = None,
) -> Tensor:
    """Return `steps` greedy tokens (B, steps) of the masked reference, its LLM run from scratch at each step.

    They follow the prompts and, if given, `extra_ids` (B, E).
    """
    tokens = inputs["input_ids"][:, :0] if extra_ids is None else extra_ids
    encoded = adapter.encode(inputs, videos)
    for _ in range(steps):
        logits = reference_logits(adapter, inputs, selections, tokens, videos, encoded)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[:, tokens.shape[1] - steps :]
