"""The slow truth for methods inside the LLM: every token runs through every layer, what was dropped is hidden by masks.

Attention is the model's own, computed eagerly; merging happens where dropped tokens still are. Nothing is shared with
the hooks that prune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded
from vidsieve.adapters.transformers_api import eager_attention, window_of
from vidsieve.compressors.base import LayerCompressor
from vidsieve.types import LayerView, Selection

Act = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
"""What happens before a stage's layer: from hidden states, mask so far and the layer's arguments to hidden states."""


class LayeredSelections(list[Selection]):
    """What a method inside the LLM keeps of each video after its last stage, and how it came to that.

    `entering` is what reaches the LLM, `stages` what is left from each stage's layer on, one Selection a video.
    """

    def __init__(self, compressor: LayerCompressor, entering: Sequence[Selection]) -> None:
        super().__init__(entering)
        self.compressor, self.entering = compressor, list(entering)
        self.stages: dict[int, list[Selection]] = {}
        self.views: dict[int, list[LayerView]] = {}

    def history(self, video: int, layer: int) -> tuple[int, ...]:
        """Return how many of a video's tokens each layer before `layer` sees."""
        left = {at: kept[video].num_kept for at, kept in self.stages.items()}
        return tuple(
            left[max(at for at in left if at <= number)]
            if any(at <= number for at in left)
            else self.entering[video].num_kept
            for number in range(layer)
        )

    def take(self, layer: int, kept: list[Selection]) -> None:
        """Note what is left from `layer` on."""
        self.stages[layer] = kept
        self[:] = kept


def hidden_mask(visible: Tensor, like: Tensor) -> Tensor:
    """Return a causal mask (B, 1, L, L), of the dtype of `like`, in which the tokens of `visible` (B, L) are seen."""
    length = visible.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=visible.device).tril()
    # A hidden query may look at itself: its row is never read, but must not be empty.
    mask = (causal & visible[:, None, :]) | torch.eye(length, dtype=torch.bool, device=visible.device)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~mask, torch.finfo(like.dtype).min
    )[:, None]


def windowed(mask: Tensor, window: int | None) -> Tensor:
    """Return a mask (B, 1, L, L) under which a query sees so many columns back, itself included; None: all."""
    if window is None:
        return mask
    column = torch.arange(mask.shape[-1], device=mask.device)
    far = column[:, None] - column >= window
    return mask.masked_fill(far, torch.finfo(mask.dtype).min)


def visible_tokens(encoded: Encoded, selections: Sequence[Selection], length: int | None = None) -> Tensor:
    """Return which tokens of the prompts (B, L) are seen under one Selection a video; all behind the prompts are."""
    visible = encoded.attention_mask.clone()
    for span, selection in zip(encoded.videos, selections, strict=True):
        visible[span.row, span.columns] = False
        visible[span.row, span.columns[selection.indices.to(span.columns.device)]] = True
        if span.features.per_row:
            for line, column in enumerate(span.tail_columns.tolist()):  # a newline is seen where its row is
                visible[span.row, column] = bool((selection.indices // span.features.grid.width == line).any())
    if length is not None and length > visible.shape[1]:
        more = torch.ones(len(visible), length - visible.shape[1], dtype=torch.bool, device=visible.device)
        visible = torch.cat([visible, more], 1)
    return visible


@contextmanager
def masked_from(adapter: Adapter, masks: dict[int, Tensor], acts: Mapping[int, Act]) -> Iterator[None]:
    """Give every layer the mask of the last stage before it, and run what happens before a stage's layer.

    An act may put the mask of its own layer into `masks`.
    """

    def before(number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            so_far = masks[max(layer for layer in masks if layer < max(number, 1))]
            if number in acts:
                hidden = acts[number](hidden, windowed(so_far, window_of(text, number)), kwargs)
            mask = masks[max(layer for layer in masks if layer <= number)]
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            return (hidden, *args[1:]), rest | {"attention_mask": windowed(mask, window_of(text, number))}

        return hook

    text = adapter.model.config.get_text_config()
    slides = any(window_of(text, number) is not None for number in range(len(adapter.decoder_layers)))
    # One mask for all layers is the model's own to hand on.
    layers = list(adapter.decoder_layers) if acts or len(masks) > 1 or slides else []
    hooks = [layer.register_forward_pre_hook(before(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def merging(encoded: Encoded, selections: LayeredSelections, layer: int) -> Act:
    """Return the act of a stage that merges: what stays at `layer` takes in what is dropped there."""
    earlier = [selections.entering, *(kept for at, kept in sorted(selections.stages.items()) if at < layer)][-1]

    def act(hidden: Tensor, mask: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        changed = hidden.clone()
        triples = zip(encoded.videos, earlier, selections.stages[layer], strict=True)
        for number, (span, among, kept) in enumerate(triples):
            chosen = torch.searchsorted(among.indices, kept.indices)
            tokens = hidden[span.row, span.columns[among.indices.to(span.columns.device)]]
            view = replace(selections.views[layer][number], hidden=tokens)
            made = selections.compressor.merge(view, chosen)
            changed[span.row, span.columns[kept.indices.to(span.columns.device)]] = made.to(hidden.dtype)
        return changed

    return act


def _behind(encoded: Encoded, span: Any, columns: Tensor) -> Tensor:
    """Return the columns (Q,) of the text behind a video's `columns` in its prompt."""
    real = encoded.attention_mask[span.row].clone()
    for video in encoded.videos:
        if video.row == span.row:
            real[video.columns] = real[video.tail_columns] = False
    real[: int(columns.max()) + 1] = False
    return real.nonzero().flatten()


def layered_choice(adapter: Adapter, encoded: Encoded, compressor: LayerCompressor, run: Any) -> LayeredSelections:
    """Return what a method keeps of each video, from the model's own eager attention.

    `run(selections, masks, acts)` sends the whole prompts through the LLM under `masked_from`.
    """
    depth = len(adapter.decoder_layers)
    outer = compressor.outer(depth)
    entering = encoded.everything()
    if outer is not None:
        entering = adapter.select(encoded, outer, Generator().manual_seed(0))[0]
    found = LayeredSelections(compressor, entering)
    plans = [dict(compressor.stages(depth, chosen.num_kept)) for chosen in entering]
    masks: dict[int, Tensor] = {}
    told: list[Tensor] = []
    noted: dict[int, Tensor] = {}
    entered: dict[int, Tensor] = {}

    def act_at(layer: int) -> Act:
        def act(hidden: Tensor, mask: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
            weights = noted.get(layer - 1)
            if compressor.own_layer:
                module: Any = adapter.decoder_layers[layer]
                given = {key: kwargs[key] for key in ("position_embeddings", "position_ids") if key in kwargs}
                weights = module.self_attn(module.input_layernorm(hidden), attention_mask=mask, **given)[1]
            assert weights is not None
            kept = []
            for number, span in enumerate(encoded.videos):
                last = int(encoded.attention_mask[span.row].nonzero().max())
                indices = found[number].indices
                row = weights[span.row, :, last, span.columns[indices.to(span.columns.device)]].float()
                tokens = hidden[span.row, span.columns[indices.to(span.columns.device)]]
                view = LayerView(
                    layer, span.features.grid, indices, row, tokens, history=found.history(number, layer), depth=depth
                )
                if compressor.reads_text:
                    columns = span.columns[indices.to(span.columns.device)]
                    text = _behind(encoded, span, columns)
                    view = replace(view, text_attention=weights[span.row][:, text][:, :, columns].float())
                groups = entering[number].groups
                if groups is not None:
                    view = replace(view, groups=groups[torch.searchsorted(entering[number].indices, indices)])
                if compressor.reads_before:
                    view = replace(view, before=entered[layer - 1][span.row, span.columns[indices]])
                if told:
                    view = replace(view, told=told[number])
                found.views.setdefault(layer, []).append(view)
                kept.append(Selection(indices[compressor.choose(view, plans[number][layer]).to(indices.device)]))
            found.take(layer, kept)
            masks[layer] = hidden_mask(visible_tokens(encoded, kept, hidden.shape[1]), hidden)
            return merging(encoded, found, layer)(hidden, mask, kwargs) if compressor.merges else hidden

        return act

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds = args[0] if args else kwargs["hidden_states"]
        for span, kept in zip(encoded.videos, entering, strict=True):
            columns = span.columns[kept.indices.to(span.columns.device)]
            told.append(
                compressor.prepare(embeds[span.row, columns], embeds[span.row, _behind(encoded, span, columns)])
            )

    def enter(number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    listeners = []
    for layer in plans[0] if compressor.reads_before else ():
        before_it = adapter.decoder_layers[layer - 1]
        listeners.append(before_it.register_forward_pre_hook(enter(layer - 1), with_kwargs=True))
    for layer in plans[0]:
        attention: Any = adapter.decoder_layers[layer - 1].self_attn
        listeners.append(
            attention.register_forward_hook(lambda module, args, output, at=layer - 1: noted.update({at: output[1]}))
        )
    if compressor.prepares:
        listeners.append(adapter.decoder_layers[0].register_forward_pre_hook(look, with_kwargs=True))
    try:
        with eager_attention(adapter.model):
            run(entering, masks, {layer: act_at(layer) for layer in plans[0]})
    finally:
        for listener in listeners:
            listener.remove()
    return found
