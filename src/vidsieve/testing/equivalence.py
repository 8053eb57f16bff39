"""The equivalence table: pruned calls against the masked reference, for a family, every call and both attentions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.family import Videos
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.base import Compressor
from vidsieve.errors import UnsupportedCallError
from vidsieve.loading import load
from vidsieve.testing.calls import CALLS, REFUSED, SLOW_CALLS, Case
from vidsieve.testing.checks import CheckFailure
from vidsieve.testing.reference import shortens
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for

TOLERANCE = 1e-4
CONFIGURATIONS = ("batch 1", "ragged batch 2", "two videos", "video and image")


@dataclass(frozen=True)
class EquivalenceCell:
    """One cell of the table: the largest difference, and whether generated tokens are equal (None: none generated).

    `error` is the message of a call that the method refuses.
    """

    family: str
    configuration: str
    call: str
    attention: str
    difference: float | None
    tokens_equal: bool | None
    error: str | None = None

    @property
    def passed(self) -> bool:
        """True if the difference is within `TOLERANCE` and generated tokens are equal."""
        return self.difference is not None and self.difference <= TOLERANCE and self.tokens_equal is not False


def configuration(family: str, name: str) -> dict[str, Tensor]:
    """Return the inputs of one configuration; the ragged batch keeps different numbers of tokens per prompt."""
    grid = default_grid(family)
    if name == "batch 1":
        return inputs_for(family, [[grid]])
    if name == "ragged batch 2":
        # Two videos in one prompt, one in the other: lengths and kept counts differ.
        return inputs_for(family, [[grid, grid], [grid]], words=[3, 9])
    if name == "video and image":
        return inputs_for(family, [[grid], [grid]], words=[3, 8], image=True)
    return inputs_for(family, [[grid, grid]])


def videos_of(family: str, name: str) -> Videos:
    """Return `videos` for a configuration in which a still image would be taken for a frame, else None."""
    if name != "video and image" or family not in ("internvl", "smolvlm"):
        return None
    frames = default_grid(family).frames
    return [(0, frames), (frames + 1, frames)]


def cell(
    family: str,
    name: str,
    call: str,
    attention: str,
    compressor: Compressor,
    model: Any = None,
    positions: str = "installed",
    device: str = "cpu",
) -> EquivalenceCell:
    """Return one cell of the table on this family's tiny model."""
    model = model if model is not None else FAMILIES[family]().to(device)
    model.set_attn_implementation(attention)
    inputs = {key: value.to(device) for key, value in configuration(family, name).items()}
    case = Case(adapter_for(model, positions=positions), inputs, compressor, videos_of(family, name))
    return _cell(case, name, call, attention)


def _cell(case: Case, name: str, call: str, attention: str) -> EquivalenceCell:
    family = case.adapter.family
    try:
        difference, equal = (CALLS | SLOW_CALLS)[call](case)
    except UnsupportedCallError as error:
        # A static cache has one length for all layers, which a method inside the LLM cannot keep to, and some families
        # are masked otherwise on it.
        if call != "static cache":
            raise
        return EquivalenceCell(family, name, call, attention, None, None, str(error))
    return EquivalenceCell(family, name, call, attention, difference, equal)


def table(compressor: Compressor | None = None) -> Iterator[EquivalenceCell]:
    """Yield every cell: families × configurations × calls × {eager, sdpa}; default method: random at 0.3.

    `SLOW_CALLS`, which change the model, run on the ragged batch with sdpa.
    """
    method = compressor or load("random", retention=0.3)
    for family in FAMILIES:
        for attention in ("eager", "sdpa"):
            model = FAMILIES[family]()
            for name in CONFIGURATIONS:
                for call in CALLS:
                    yield cell(family, name, call, attention, method, model)
        for call in SLOW_CALLS:
            yield cell(family, "ragged batch 2", call, "sdpa", method)


def refusals(family: str, compressor: Compressor) -> dict[str, str]:
    """Return the error that each of the `REFUSED` calls gives on this family.

    Raises
    ------
    CheckFailure
        If one is not refused.
    """
    model, messages = FAMILIES[family](), {}
    case = Case(adapter_for(model), configuration(family, "batch 1"), compressor)
    for name, options in REFUSED.items():
        try:
            with case.attached():
                case.generate(**options)
        except UnsupportedCallError as error:
            messages[name] = str(error)
        else:
            raise CheckFailure(f"{family}: {name} is not refused")
    return messages


def check_full_retention(case: Case) -> None:
    """Compare the logits from the adapter's inputs, every token kept, with the model's own."""
    adapter, inputs = case.adapter, case.inputs
    with torch.no_grad():
        encoded = adapter.encode(inputs, case.videos)
        pruned = adapter.build(encoded, encoded.per_row(encoded.everything()))
        ours, theirs = adapter.model(**pruned.inputs).logits, adapter.model(**inputs).logits
    for row in range(len(case.ids)):
        kept = pruned.kept_positions[row]
        gap = float((ours[row, kept >= 0] - theirs[row, kept[kept >= 0]]).abs().max())
        if not gap <= TOLERANCE:  # NaN is no equality
            raise CheckFailure(
                f"{adapter.family}: with every token kept, logits differ by {gap:.1e} from the model's own: look at "
                "video_features, positions and encoder_outputs"
            )


def check_reach(case: Case) -> None:
    """Change the feature of each prompt's last kept video token, and require that its last logits follow."""
    adapter, inputs = case.adapter, case.inputs
    with torch.no_grad():
        encoded, chosen = adapter.encode(inputs, case.videos), case.chosen()
        changed = list(chosen)
        for row in range(len(case.ids)):
            number = max(encoded.of_row(row), key=lambda i: int(encoded.videos[i].columns[chosen[i].indices[-1]]))
            selection, embeds = chosen[number], encoded.videos[number].features.embeds
            kept = embeds[selection.indices] if selection.embeds is None else selection.embeds
            changed[number] = replace(selection, embeds=torch.cat([kept[:-1], 1 - kept[-1:]]))
        plans = [adapter.build(encoded, encoded.per_row(some)) for some in (chosen, changed)]
        before, after = (adapter.model(**plan.inputs, use_cache=True).logits[:, -1] for plan in plans)
    for row in (before == after).all(-1).nonzero().flatten().tolist():
        raise CheckFailure(
            f"{adapter.family}: the last logits of prompt {row} do not depend on the last video token that is kept: no "
            "layer reaches that far back, or its feature is not used"
        )


def check_family(
    model: Any,
    inputs: Mapping[str, Any],
    compressor: Compressor | None = None,
    videos: Videos = None,
    calls: Iterable[str] = CALLS,
) -> list[EquivalenceCell]:
    """Check a model family of your own: all tokens against the model itself, every call against its reference.

    Parameters
    ----------
    model : a float32 model whose class is registered in `vidsieve.registry.families`
        A small random one will do, if its weights are spread enough that answers differ.
    inputs : mapping
        Outputs of its processor for one prompt or a padded batch.
    compressor : Compressor, optional
        Default: random at 0.3.
    videos : as `prune` takes it
    calls : names among `CALLS`

    Returns
    -------
    list of EquivalenceCell, one a call

    Raises
    ------
    CheckFailure
        If the adapter's inputs with every token kept give other logits than the model's own, or a call differs from the
        reference by more than `TOLERANCE`, or generates other tokens; if a prompt's last logits do not depend on the
        last video token that is kept, which is checked where some layers do not see all tokens.
    """
    method = compressor or load("random", retention=0.3)
    case = Case(adapter_for(model), inputs, method, videos)
    family = case.adapter.family
    if case.adapter.layout == "installed":
        check_full_retention(case)
    if shortens(case.adapter):
        check_reach(case)
    cells = [_cell(case, "given inputs", name, model.config._attn_implementation) for name in calls]
    wrong = [
        f"{c.call} differs by {c.difference:.1e}, tokens equal: {c.tokens_equal}"
        for c in cells
        if c.difference is not None and not c.passed
    ]
    if wrong:
        raise CheckFailure(f"{family}: {'; '.join(wrong)}")
    return cells
