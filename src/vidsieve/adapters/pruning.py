"""The door that is a pure function: inputs in, pruned inputs out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Generator

from vidsieve import registry
from vidsieve.adapters.base import Adapter, Videos
from vidsieve.adapters.batch import Template
from vidsieve.compressors.base import Compressor
from vidsieve.errors import StageError, UnsupportedModelError
from vidsieve.types import Stage


def adapter_for(model: Any, template: Template | None = None, positions: str = "installed") -> Adapter:
    """Return the adapter of a model, found by the names of its classes.

    Raises
    ------
    UnsupportedModelError
        If no family is registered for it.
    """
    for base in type(model).__mro__:
        if base.__name__ in registry.families:
            adapter: Adapter = registry.families.get(base.__name__)(model, template, positions)
            return adapter
    raise UnsupportedModelError(
        f"no adapter for {type(model).__name__}; supported: {', '.join(registry.families)}. To add a family, write a "
        "vidsieve.adapters.Adapter and register it: vidsieve.registry.families.register('ClassName', 'module:Adapter')"
    )


def prune(
    model: Any,
    inputs: Mapping[str, Any],
    compressor: Compressor,
    *,
    positions: str = "installed",
    template: Template | None = None,
    generator: Generator | None = None,
    videos: Videos = None,
) -> dict[str, Any]:
    """Return the inputs of `model.generate` or `model.forward` with each video cut to its budget.

    A pure function: `model` and `inputs` are not changed. Use the result for one call (`generate` expands
    the features inside it when it runs beams). It carries ``use_cache=True``, because without a cache
    transformers reads gaps in the positions as packed sequences. Gradients reach the features: wrap the call
    in ``torch.no_grad()`` where none are wanted. Give an ``attention_mask`` where prompts are padded.

    Parameters
    ----------
    model : a transformers model of a registered family
    inputs : mapping
        What the model's processor returned: ``input_ids`` (B, L), ``attention_mask``, pixels, …
    compressor : Compressor
    positions : str
        The position convention: ``"installed"`` (original ids as the installed transformers computes them),
        ``"legacy"`` (as transformers before 5.3 and vLLM), ``"compact"`` (counted anew over what is kept; families
        with 1-D positions).
    template : Template, optional
        Ids of the chat template, for tokenizers that vidsieve does not know.
    generator : torch.Generator, optional
        For methods that draw.
    videos : list of (first, count), optional
        Which runs of images are the frames of a video, for families whose frames are images (InternVL, SmolVLM);
        default: all images of a prompt that has two or more.

    Raises
    ------
    UnsupportedModelError, StageError, NeedError, PolicyMismatchError, PromptError, UnsupportedCallError
    """
    adapter = adapter_for(model, template, positions)
    adapter.check(compressor)
    if compressor.stage is not Stage.PRE_LLM:
        raise StageError(
            f"{compressor.name} acts {compressor.stage.value}: use vidsieve.attach, inputs cannot hold that"
        )
    pruned = adapter.prune(inputs, compressor, generator, videos)
    for features in pruned.inputs["mm_encoder_outputs"].values():
        features.vidsieve_pruned = True
    return pruned.inputs | {"use_cache": True}


def is_pruned(call: Mapping[str, Any]) -> bool:
    """Return whether the arguments of a call came out of `prune`."""
    return any(hasattr(features, "vidsieve_pruned") for features in (call.get("mm_encoder_outputs") or {}).values())
