"""Recorded decoders: a plain Llama with the recorded weights, on which methods inside the LLM run through our hooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from replays import Archive
from vidsieve.adapters.decoder_layer import Decoder
from vidsieve.adapters.inside.layers import LayerRun
from vidsieve.adapters.inside.view import PlacedVideo
from vidsieve.adapters.transformers_api import cache_kwargs
from vidsieve.compressors.inside import LayerCompressor
from vidsieve.types import TokenGrid


def recorded_llama(
    archive: Archive, prefix: str, hidden: int, inner: int, depth: int, heads: int, kv_heads: int
) -> Any:
    """Return a Llama with the weights under `prefix`, as float32."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=8,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    model = LlamaModel(config).eval()
    weights = {k[len(prefix) :]: torch.from_numpy(v).float() for k, v in archive.items() if k.startswith(prefix)}
    model.load_state_dict(weights, strict=False)
    return model


@dataclass
class Passed:
    """What one pass of a prompt left behind: per stage layer the columns kept and what entered; output, cache, run."""

    kept: dict[int, Tensor]
    entered: dict[int, Tensor]
    last: Tensor
    cache: Any
    run: LayerRun
    positions: dict[int, Tensor] = field(default_factory=dict)

    def lengths(self) -> list[int]:
        """Return how many tokens every layer's cache holds."""
        return [self.cache.get_seq_length(layer) for layer in range(self.run.depth)]


def passed(model: Any, embeds: Tensor, start: int, count: int, method: LayerCompressor) -> Passed:
    """Run a prompt of embeds (L, D), the visual tokens at `start` … `start + count`, with a method at work."""
    depth, length = len(model.layers), len(embeds)
    columns = torch.arange(start, start + count)
    video = PlacedVideo(0, columns, TokenGrid(1, 1, count), columns[:0], False, torch.arange(count))
    positions = torch.arange(length)[None]
    real = torch.ones(1, length, dtype=torch.bool)
    run = LayerRun(method, positions[None], real, (video,), depth)
    cache = DynamicCache(config=model.config)
    entered: dict[int, Tensor] = {}
    numbered: dict[int, Tensor] = {}

    def listen(layer: int) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            # Registered before the hooks that prune: what comes out of the layer before.
            entered[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        return model.layers[layer].register_forward_pre_hook(before, with_kwargs=True)

    def told(layer: int) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            numbered[layer] = kwargs["position_ids"][0]

        return model.layers[layer].self_attn.register_forward_pre_hook(before, with_kwargs=True)

    handles = [hook for layer in run.stages for hook in (listen(layer), told(layer))]
    with torch.no_grad(), run.hooked(Decoder(model.layers, model.config, model.rotary_emb), cache):
        out = model(inputs_embeds=embeds[None], position_ids=positions, **cache_kwargs(model, cache))
    for handle in handles:
        handle.remove()
    kept = {layer: run.kept[layer][0] for layer in run.stages}
    return Passed(kept, entered, out.last_hidden_state[0, kept[run.stages[-1]]], cache, run, numbered)
