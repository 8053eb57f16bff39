"""The slow truth for methods inside the LLM: every token runs through every layer, what was dropped is hidden by masks.

Attention is the model's own, computed eagerly; merging happens where dropped tokens still are. Nothing is shared with
the hooks that prune.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded
from vidsieve.adapters.transformers_api import eager_attention, window_of
from vidsieve.compressors.inside import LayerCompressor, Rows
from vidsieve.testing.checks import CheckFailure
from vidsieve.testing.views import GivenView
from vidsieve.types import Selection

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
        self.views: dict[int, list[tuple[GivenView, int]]] = {}

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
    """Return the act of a stage: dropped tokens are merged into those that stay at `layer`, if the method merges.

    The method chooses again, from its view with the hidden states of this pass.
    """
    earlier = [selections.entering, *(kept for at, kept in sorted(selections.stages.items()) if at < layer)][-1]

    def act(hidden: Tensor, mask: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        changed = hidden.clone()
        triples = zip(encoded.videos, earlier, selections.stages[layer], strict=True)
        for number, (span, among, kept) in enumerate(triples):
            tokens = hidden[span.row, span.columns[among.indices.to(span.columns.device)]]
            view, keep = selections.views[layer][number]
            choice = selections.compressor.step(replace(view, tensors={**view.tensors, "hidden": tokens}), keep)
            if not torch.equal(among.indices[choice.indices.to(among.indices.device)], kept.indices):
                raise CheckFailure(f"{selections.compressor.name} chose other tokens at layer {layer} than before")
            if choice.hidden is not None:
                changed[span.row, span.columns[kept.indices.to(span.columns.device)]] = choice.hidden.to(hidden.dtype)
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
    depth, compressor = len(adapter.decoder_layers), adapter.fitted(compressor)
    outer = compressor.outer(depth)
    entering = encoded.everything()
    if outer is not None:
        entering = adapter.select(encoded, outer, Generator().manual_seed(0))[0]
    selections = LayeredSelections(compressor, entering)
    plans = [dict(compressor.stages(depth, chosen.num_kept)) for chosen in entering]
    masks: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    entered: dict[int, Tensor] = {}

    def act_at(layer: int) -> Act:
        def act(hidden: Tensor, mask: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
            @functools.cache
            def own() -> Tensor:
                module: Any = adapter.decoder_layers[layer]
                given = {key: kwargs[key] for key in ("position_embeddings", "position_ids") if key in kwargs}
                probabilities: Tensor = module.self_attn(module.input_layernorm(hidden), attention_mask=mask, **given)[
                    1
                ]
                return probabilities

            kept, views = [], []
            for number, span in enumerate(encoded.videos):
                indices = selections[number].indices
                columns = span.columns[indices.to(span.columns.device)]
                first = span.columns[entering[number].indices.to(span.columns.device)]
                text = _behind(encoded, span, first)
                last = encoded.attention_mask[span.row].nonzero().flatten()[-1:]

                def part(of: Callable[[], Tensor], rows: Tensor, row: int, columns: Tensor) -> Tensor:
                    return of()[row][:, rows][:, :, columns].float()

                rows: dict[tuple[Rows, int], Tensor | Callable[[], Tensor]] = {}
                for at, of in ((layer - 1, functools.partial(weights.__getitem__, layer - 1)), (layer, own)):
                    rows["last", at] = functools.partial(part, of, last, span.row, columns)
                    rows["text", at] = functools.partial(part, of, text, span.row, columns)
                tensors = {
                    "hidden": hidden[span.row, columns],
                    "before": entered[layer - 1][span.row, columns],
                    "video": entered[0][span.row, first],
                    "text": entered[0][span.row, text],
                }
                groups = entering[number].groups
                if groups is not None:
                    groups = groups[torch.searchsorted(entering[number].indices, indices)]
                seen = (layer, depth, span.features.grid, indices, selections.history(number, layer), groups)
                view, keep = GivenView(*seen, rows=rows, tensors=tensors), plans[number][layer]
                views.append((view, keep))
                kept.append(Selection(indices[compressor.step(view, keep).indices.to(indices.device)]))
            selections.views[layer] = views
            selections.take(layer, kept)
            masks[layer] = hidden_mask(visible_tokens(encoded, kept, hidden.shape[1]), hidden)
            return merging(encoded, selections, layer)(hidden, mask, kwargs)

        return act

    def enter(number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    listeners = []
    for layer in {0, *(layer - 1 for layer in plans[0])}:
        module: Any = adapter.decoder_layers[layer]
        listeners.append(module.register_forward_pre_hook(enter(layer), with_kwargs=True))
        listeners.append(
            module.self_attn.register_forward_hook(
                lambda module, args, output, at=layer: weights.update({at: output[1]})
            )
        )
    try:
        with eager_attention(adapter.model):
            run(entering, masks, {layer: act_at(layer) for layer in plans[0]})
    finally:
        for listener in listeners:
            listener.remove()
    return selections
