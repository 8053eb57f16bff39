"""The equivalence table: pruned calls against the masked reference, for a family, every call and both attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vidsieve
from vidsieve.adapters.base import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.base import Compressor, LayerCompressor
from vidsieve.selection import indices_to_mask
from vidsieve.testing.checks import CheckFailure
from vidsieve.testing.reference import LayeredSelections, attended, masked_greedy, masked_logits
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import LayerView, Selection

STEPS = 8
TOLERANCE = 1e-4
CONFIGURATIONS = ("batch 1", "ragged batch 2", "two videos")


@dataclass(frozen=True)
class Cell:
    """One cell of the table: the largest difference, and whether generated tokens are equal (None: none made)."""

    family: str
    configuration: str
    call: str
    attention: str
    difference: float
    tokens_equal: bool | None

    @property
    def passed(self) -> bool:
        """Whether the cell holds."""
        return self.difference <= TOLERANCE and self.tokens_equal is not False


def configuration(family: str, name: str) -> dict[str, Tensor]:
    """Return the inputs of one configuration; the ragged batch keeps different numbers of tokens per prompt."""
    grid = default_grid(family)
    if name == "batch 1":
        return inputs_for(family, [[grid]])
    if name == "ragged batch 2":
        # One prompt with two videos beside one with one: lengths and kept counts differ.
        return inputs_for(family, [[grid, grid], [grid]], words=[3, 9])
    return inputs_for(family, [[grid, grid]])


def _selections(
    adapter: Adapter, inputs: dict[str, Tensor], compressor: Compressor, gradients: bool = False
) -> list[Selection]:
    if isinstance(compressor, LayerCompressor):
        return _layered_selections(adapter, inputs, compressor)
    with torch.set_grad_enabled(gradients):
        return adapter.select(
            adapter.encode(inputs, needs=compressor.needs), compressor, torch.Generator().manual_seed(0)
        )[0]


def _layered_selections(adapter: Adapter, inputs: dict[str, Tensor], compressor: LayerCompressor) -> LayeredSelections:
    """Return what a method with one stage inside the LLM keeps, from the model's own eager attention."""
    depth, chosen = len(adapter.decoder_layers), LayeredSelections()
    with torch.no_grad():
        for video, span in enumerate(adapter.encode(inputs).videos):
            grid = span.features.grid
            ((layer, keep),) = compressor.stages(depth, grid.num_tokens)
            weights = attended(adapter, inputs, layer - 1)[video]
            view = LayerView(layer, grid, torch.arange(grid.num_tokens), weights)
            chosen.append(Selection(compressor.choose(view, keep)))
            chosen.from_layer = layer
    return chosen


def _prefill(adapter: Adapter, inputs: dict[str, Tensor], compressor: Compressor) -> tuple[float, bool | None]:
    with torch.no_grad():
        chosen = _selections(adapter, inputs, compressor)
        wanted = masked_logits(adapter, inputs, chosen)
        with vidsieve.attach(adapter.model, compressor, positions=adapter.convention) as session:
            got = adapter.model(**inputs).logits
        kept = session.kept_positions
        if isinstance(compressor, LayerCompressor) and kept is not None:
            for span, selection in zip(adapter.encode(inputs).videos, chosen, strict=True):
                dropped = span.columns[(indices_to_mask(selection.indices, len(span.columns))).logical_not()]
                newlines = span.tail_columns[span.features.kept_tail(selection.indices).logical_not()]
                dropped = torch.cat([dropped, newlines])
                kept[span.row] = kept[span.row].where(~torch.isin(kept[span.row], dropped), -1)
    return _gap(got, wanted, kept), None


def _gap(got: Tensor, wanted: Tensor, kept: Tensor | None) -> float:
    """Return the largest difference of pruned logits to the reference's at the columns that were kept."""
    if kept is None:
        raise vidsieve.VidsieveError("nothing was pruned")
    rows = torch.arange(len(kept))[:, None].expand_as(kept)
    real = kept >= 0
    return float((got[real] - wanted[rows[real], kept[real]]).abs().max())


def _greedy(adapter: Adapter, inputs: dict[str, Tensor], compressor: Compressor) -> tuple[float, bool | None]:
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        chosen = _selections(adapter, inputs, compressor)
        wanted = masked_greedy(adapter, inputs, chosen, STEPS)
        with vidsieve.attach(adapter.model, compressor, positions=adapter.convention):
            out = adapter.model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        last = masked_logits(adapter, inputs, chosen, wanted[:, :-1])[:, -1]
    equal = torch.equal(out.sequences, torch.cat([inputs["input_ids"], wanted], 1)) and out.sequences.shape[1] > prompt
    return float((out.logits[-1] - last).abs().max()), equal


def _beams(adapter: Adapter, inputs: dict[str, Tensor], compressor: Compressor) -> tuple[float, bool | None]:
    with torch.no_grad():
        chosen = _selections(adapter, inputs, compressor)
        wanted, score = _beam_reference(adapter, inputs, chosen, beams=2)
        with vidsieve.attach(adapter.model, compressor, positions=adapter.convention):
            out = adapter.model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, num_beams=2, return_dict_in_generate=True,
                output_scores=True,
            )  # fmt: skip
    equal = torch.equal(out.sequences, torch.cat([inputs["input_ids"], wanted], 1))
    return float((out.sequences_scores - score).abs().max()), equal


def _beam_reference(
    adapter: Adapter, inputs: dict[str, Tensor], chosen: list[Selection], beams: int
) -> tuple[Tensor, Tensor]:
    """Return the best of `beams` beams (B, STEPS) and its mean log-probability (B,), recomputed at every step."""
    batch = inputs["input_ids"].shape[0]
    made = torch.empty(batch, 1, 0, dtype=torch.int64)
    totals = torch.zeros(batch, 1)
    for _ in range(STEPS):
        log_p = torch.stack(
            [
                F.log_softmax(masked_logits(adapter, inputs, chosen, made[:, i])[:, -1], -1)
                for i in range(made.shape[1])
            ], 1,
        )  # fmt: skip
        vocabulary = log_p.shape[-1]
        totals, flat = (totals[..., None] + log_p).flatten(1).topk(beams, 1)
        parent, token = flat // vocabulary, flat % vocabulary
        made = torch.cat([made[torch.arange(batch)[:, None], parent], token[..., None]], 2)
    return made[:, 0], totals[:, 0] / STEPS


def _second_turn(adapter: Adapter, inputs: dict[str, Tensor], compressor: Compressor) -> tuple[float, bool | None]:
    with torch.no_grad():
        chosen = _selections(adapter, inputs, compressor)
        first = masked_greedy(adapter, inputs, chosen, STEPS)
        words = torch.arange(40, 46).expand(first.shape[0], -1)
        extra = torch.cat([first, words], 1)
        wanted = masked_greedy_after(adapter, inputs, chosen, extra)
        model = adapter.model
        with vidsieve.attach(model, compressor, positions=adapter.convention):
            out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
            conversation = torch.cat([out.sequences, words], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1)
            again = model.generate(
                input_ids=conversation, attention_mask=mask, past_key_values=out.past_key_values,
                max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        reference = masked_logits(adapter, inputs, chosen, extra)[:, -1]
    equal = torch.equal(again.sequences, torch.cat([conversation, wanted], 1))
    return float((again.logits[0] - reference).abs().max()), equal


def masked_greedy_after(adapter: Adapter, inputs: dict[str, Tensor], chosen: list[Selection], extra: Tensor) -> Tensor:
    """Return `STEPS` greedy tokens (B, STEPS) of the reference after the prompt and `extra` tokens."""
    made = extra
    for _ in range(STEPS):
        made = torch.cat([made, masked_logits(adapter, inputs, chosen, made)[:, -1].argmax(-1, keepdim=True)], 1)
    return made[:, extra.shape[1] :]


def _labels(adapter: Adapter, inputs: dict[str, Tensor], compressor: Compressor) -> tuple[float, bool | None]:
    """Compare the loss on the words after the video, and its gradient in the vision tower."""
    # Merged tokens pass gradients on, so they must not be constants of the reference.
    model, chosen = adapter.model, _selections(adapter, inputs, compressor, gradients=True)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -5:] = ids[:, -5:]
    tower = [p for n, p in model.named_parameters() if ("patch_embed" in n or "vis" in n) and p.ndim > 1]
    weight = tower[0]
    model.zero_grad()
    logits = masked_logits(adapter, inputs, chosen)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    wanted.backward()  # type: ignore[no-untyped-call]
    gradient = weight.grad.clone()
    model.zero_grad()
    with vidsieve.attach(model, compressor, positions=adapter.convention):
        got = model(**inputs, labels=labels, use_cache=False).loss
    got.backward()
    gap = max(float((got - wanted).detach().abs()), float((weight.grad - gradient).abs().max()))
    model.zero_grad()
    return gap, None


CALLS: dict[str, Callable[[Adapter, dict[str, Tensor], Compressor], tuple[float, bool | None]]] = {
    "prefill logits": _prefill,
    "8 greedy tokens": _greedy,
    "2 beams": _beams,
    "second turn": _second_turn,
    "forward with labels": _labels,
}


def cell(
    family: str, name: str, call: str, attention: str, compressor: Compressor, model: Any = None,
    positions: str = "installed",
) -> Cell:  # fmt: skip
    """Return one cell of the table on this family's tiny model."""
    model = model if model is not None else FAMILIES[family]()
    model.set_attn_implementation(attention)
    difference, equal = CALLS[call](adapter_for(model, positions=positions), configuration(family, name), compressor)
    return Cell(family, name, call, attention, difference, equal)


def table(compressor: Compressor | None = None) -> Iterator[Cell]:
    """Yield every cell: families × configurations × calls × {eager, sdpa}; default method: random at 0.3."""
    method = compressor or vidsieve.load("random", retention=0.3)
    for family in FAMILIES:
        for attention in ("eager", "sdpa"):
            model = FAMILIES[family]()
            for name in CONFIGURATIONS:
                for call in CALLS:
                    yield cell(family, name, call, attention, method, model)


def check_family(model: Any, inputs: dict[str, Tensor], compressor: Compressor | None = None) -> list[Cell]:
    """Check a model family of your own: every call on a model of it against the masked reference.

    Parameters
    ----------
    model : a float32 model whose class is registered in `vidsieve.registry.families`
        A small random one will do; with weights spread enough that answers differ.
    inputs : dict
        What its processor returned, for one prompt or a padded batch.
    compressor : Compressor, optional
        Default: random at 0.3.

    Returns
    -------
    list of Cell, one a call

    Raises
    ------
    CheckFailure
        If a call differs from the reference by more than `TOLERANCE`, or generates other tokens.
    """
    method = compressor or vidsieve.load("random", retention=0.3)
    adapter = adapter_for(model)
    cells = []
    for name, call in CALLS.items():
        difference, equal = call(adapter, inputs, method)
        cells.append(Cell(adapter.family, "given inputs", name, model.config._attn_implementation, difference, equal))
    wrong = [f"{c.call} differs by {c.difference:.1e}, tokens equal: {c.tokens_equal}" for c in cells if not c.passed]
    if wrong:
        raise CheckFailure(f"{adapter.family}: {'; '.join(wrong)}")
    return cells
