"""`prune`: a pure function from a model's inputs to pruned inputs; and finding the adapter of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator

from vidsieve import registry
from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.family import Videos
from vidsieve.adapters.template import Template, template_or_reason
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.compressors.base import Compressor
from vidsieve.errors import (
    NeedError,
    PromptError,
    StageError,
    UnknownNameError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from vidsieve.types import Stage

LAYOUTS = ("installed", "grid")
"""Token layouts: those of the installed transformers; those of LLaVA-Video's own code (`llava_video`)."""


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT, DistributedDataParallel or FSDP wrapper.

    Raises
    ------
    UnsupportedModelError
        For DataParallel, which copies the model at every call, and for a model compiled as a whole.
    """
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return unwrapped(model.get_base_model())
    if isinstance(model, torch.nn.DataParallel):
        raise UnsupportedModelError(
            "DataParallel copies the model at every call, and copies lose what is attached: attach to model.module and "
            "call that, or use DistributedDataParallel"
        )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "this is a compiled model as a whole: attach to the model itself, and compile its language model"
        )
    if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        return unwrapped(model.module)
    return model


def adapter_for(
    model: Any,
    template: Template | NeedError | None = None,
    positions: str | None = None,
    layout: str | None = None,
) -> Adapter:
    """Return the adapter of a model, found by the names of its classes, and by the layout where it is not installed.

    A class that no family is registered for is tried through `GenericAdapter`, with a warning, if its signatures fit.

    A model that PEFT, DistributedDataParallel or FSDP have wrapped is the one inside (`Adapter.model`).

    Without `template` it is the model's attribute ``vidsieve_template``, which `vidsieve.loading.load_model` sets.
    Without `positions` and `layout` they are what the model's configuration states as ``vidsieve_positions`` and
    ``vidsieve_layout``, or ``"installed"``.

    Raises
    ------
    UnsupportedModelError
        If no family is registered for it, and it does not fit what families have in common.
    UnsupportedCallError
        If its family has no such layout.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    layout = layout or getattr(config, "vidsieve_layout", "installed")
    positions = str(positions or getattr(config, "vidsieve_positions", "installed"))
    if layout not in LAYOUTS:
        raise UnknownNameError("token layout", layout, LAYOUTS)
    if isinstance(model, Compressor):
        raise UnsupportedCallError(f"a model is needed first, not the method {model.name}: attach(model, method)")
    for base in type(model).__mro__:
        if base.__name__ in registry.families:
            name = base.__name__ if layout == "installed" else f"{base.__name__}:{layout}"
            if name not in registry.families:
                raise UnsupportedCallError(f"layout={layout!r} is for LLaVA-Video; {base.__name__} has one layout only")
            adapter: Adapter = registry.families.get(name)(model, template, positions)
            return adapter
    inside = getattr(model, "thinker", None)
    if any(base.__name__ in registry.families for base in type(inside).__mro__):
        raise UnsupportedModelError(
            f"the talker of {type(model).__name__} reads the thinker's states at every token of the prompt, dropped "
            "ones included: pass model.thinker, and ask for text alone"
        )
    from vidsieve.adapters.families.generic import generic_adapter, lacking

    missing = lacking(model)
    if missing:
        raise UnsupportedModelError(
            f"no adapter for {type(model).__name__}, and it lacks what families have in common: {'; '.join(missing)}. "
            "`vidsieve list` shows the families. To add one, write a vidsieve.adapters.Adapter and register it: "
            "vidsieve.registry.families.register('ClassName', 'module:Adapter')"
        )
    if layout != "installed":
        raise UnsupportedCallError(f"layout={layout!r} is for LLaVA-Video; {type(model).__name__} has one layout only")
    tried = generic_adapter(model)
    warnings.warn(
        f"{type(model).__name__} is of no family that vidsieve knows: it is tried through the generic adapter, as "
        f"{tried.family!r}. The first call with a video (and every vidsieve.prune) costs about three more, which "
        "compare the model alone with the model behind this adapter",
        stacklevel=3,
    )
    return tried(model, template, positions)


def adapter_with(model: Any, processor: Any) -> Adapter:
    """Return the adapter of a model whose prompts are made by a processor, which tells their chat template.

    Raises
    ------
    UnsupportedModelError
        If no family is registered for it.
    """
    stated = getattr(unwrapped(model), "vidsieve_template", None)
    return adapter_for(model, stated or template_or_reason(processor))


def prune(
    model: Any,
    inputs: Mapping[str, Any],
    compressor: Compressor,
    *,
    positions: str | None = None,
    layout: str | None = None,
    template: Template | None = None,
    generator: Generator | None = None,
    videos: Videos = None,
) -> dict[str, Any]:
    """Return the inputs of `model.generate` or `model.forward` with each video cut to its budget.

    A pure function: `model` and `inputs` are not changed. Use the result for one call (`generate` expands
    the features inside it when it runs beams), and do not go on with the cache that the call leaves: nothing tells
    later turns what it stands for; `attach` does. It carries ``use_cache=True``, because without a cache
    transformers reads gaps in the positions as packed sequences. Gradients reach the features: wrap the call
    in ``torch.no_grad()`` where none are wanted. Give an ``attention_mask`` where prompts are padded.

    Parameters
    ----------
    model : a transformers model of a registered family
    inputs : mapping
        What the model's processor returned: ``input_ids`` (B, L), ``attention_mask``, pixels, …
    compressor : Compressor
    positions : str, optional
        The position convention: ``"installed"`` (original ids as the installed transformers computes them),
        ``"legacy"`` (as transformers before 5.3 and vLLM), ``"compact"`` (counted anew over what is kept; families
        with 1-D positions).
    layout : str
        ``"grid"`` for LLaVA-Video checkpoints, which load as LLaVA-OneVision: 13×13 tokens a frame and a newline after
        each row, as they were trained; ``"installed"`` is what transformers makes (14×14, one newline in all).
        Default: ``vidsieve_layout`` in the model's configuration, or ``"installed"``.
    template : Template, optional
        ``vidsieve.Template.of(processor)``, for methods that read the question; a model of
        `vidsieve.loading.load_model` needs none.
    generator : torch.Generator, optional
        For methods that draw.
    videos : list of (first, count), optional
        Which runs of images are the frames of a video, for families whose frames are images (InternVL, SmolVLM);
        default: all images of a prompt that has two or more.

    Raises
    ------
    UnsupportedModelError, StageError, NeedError, PolicyMismatchError, PromptError, UnsupportedCallError
    """
    if is_pruned(inputs):
        raise PromptError("these inputs were pruned already: prune what the processor returned")
    adapter = adapter_for(model, template, positions, layout)
    adapter.check(compressor)
    if compressor.acts is not Stage.PRE_LLM:
        raise StageError(
            f"{compressor.name} acts {compressor.acts.value}: use vidsieve.attach, inputs cannot hold that"
        )
    pruned = adapter.prune(inputs, compressor, generator, videos)
    for features in pruned.inputs["mm_encoder_outputs"].values():
        features.vidsieve_pruned = True
    return pruned.inputs | {"use_cache": True}


def is_pruned(call: Mapping[str, Any]) -> bool:
    """True if the arguments of a call are outputs of `prune`."""
    ready = (encoder_features(call, modality) for modality in ("video", "image"))
    return any(hasattr(features, "vidsieve_pruned") for features in ready)
