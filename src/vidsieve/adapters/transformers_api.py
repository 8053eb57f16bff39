"""Everything that this package knows of transformers' insides: names of arguments, caches, attention, checkpointing.

Names are looked up in the installed signatures when a method is attached. What is needed and not there raises then, and
names the versions that work; nothing is guessed while a model runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import transformers
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vidsieve.errors import UnsupportedCallError, UnsupportedTransformersError
from vidsieve.io.versions import minor, tested_range, warn_untested

CACHE = "cache"
"""Name of the cache argument inside this package, whichever name the caller used."""
_CACHE_NAMES = ("cache", "past_key_values")
"""The names that transformers has had for it, newest first (renamed in 5.24)."""
_ENCODED = "mm_encoder_outputs"


def unsupported(what: str) -> NoReturn:
    """Raise UnsupportedTransformersError: `what` is not as this package needs it."""
    raise UnsupportedTransformersError(
        f"{what}. transformers {transformers.__version__} does not work with this vidsieve: install a version from "
        f"{tested_range('transformers')}"
    )


# -- arguments --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def cache_argument(module: nn.Module) -> str:
    """Return the name under which a model, decoder layer or attention module takes its cache.

    Raises
    ------
    UnsupportedTransformersError
        If its `forward` takes none by a known name.
    """
    parameters = _parameters(type(module).forward)
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    unsupported(f"{type(module).__name__}.forward takes no {' or '.join(_CACHE_NAMES)}")


def check_model(model: nn.Module) -> None:
    """Refuse a model whose `forward` lacks an argument that pruned prompts need; warn about untested versions.

    Raises
    ------
    UnsupportedTransformersError
    """
    warn_untested("transformers", transformers.__version__)
    cache_argument(model)
    needed = {_ENCODED, "input_ids", "attention_mask", "position_ids"}
    missing = sorted(needed - _parameters(type(model).forward))
    if missing:
        unsupported(f"{type(model).__name__}.forward takes no {', '.join(missing)}")


def check_layers(layers: nn.ModuleList) -> None:
    """Refuse decoder layers whose calls our hooks would not understand.

    Raises
    ------
    UnsupportedTransformersError
    """
    for layer in {type(layer): layer for layer in layers}.values():
        cache_argument(layer)
        missing = sorted({"hidden_states", "attention_mask"} - _parameters(type(layer).forward))
        if missing:
            unsupported(f"{type(layer).__name__}.forward takes no {', '.join(missing)}")
    for attention in filter(None, map(attention_of, layers)):
        cache_argument(attention)


def argument(kwargs: Mapping[str, Any], name: str, module: nn.Module) -> Any:
    """Return an argument that a module is called with.

    Raises
    ------
    UnsupportedTransformersError
        If the call does not have it.
    """
    if name not in kwargs:
        unsupported(f"{type(module).__name__} was called without {name}")
    return kwargs[name]


def layer_cache(kwargs: Mapping[str, Any], layer: nn.Module) -> Any:
    """Return the cache that a decoder layer is called with, None where it is called without one."""
    return argument(kwargs, cache_argument(layer), layer)


def layer_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], layer: nn.Module) -> Tensor:
    """Return the hidden states (B, L, D) that a decoder layer is called with."""
    hidden: Tensor = args[0] if args else argument(kwargs, "hidden_states", layer)
    return hidden


def normalise_cache(call: dict[str, Any]) -> None:
    """Put the cache of a caller's arguments under `CACHE`, whichever name it came by.

    Raises
    ------
    UnsupportedCallError
        If two different caches came.
    """
    given = {name: call.pop(name) for name in _CACHE_NAMES if name in call}
    caches = [cache for cache in given.values() if cache is not None]
    if len(caches) > 1 and caches[0] is not caches[1]:
        raise UnsupportedCallError(f"pass one cache: {' and '.join(given)} are the same argument")
    if given:
        call[CACHE] = caches[0] if caches else None


def for_model(call: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return arguments with the cache, if there is one, under the name that the installed model takes it by."""
    arguments = dict(call)
    if CACHE in arguments:
        arguments[cache_argument(model)] = arguments.pop(CACHE)
    return arguments


def cache_kwargs(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return a cache as the keyword argument that the installed model takes it by."""
    return {cache_argument(model): cache}


def encoder_features(call: Mapping[str, Any], modality: str) -> Any:
    """Return the ready features of "video" or "image" among the arguments of a call, None where there are none."""
    return (call.get(_ENCODED) or {}).get(modality)


# -- devices ----------------------------------------------------------------------------------------------------------


def execution_device(model: Any) -> torch.device:
    """Return the device on which a model takes its inputs.

    Weights that accelerate keeps elsewhere (`cpu_offload`, `disk_offload`, a `device_map` with "cpu" or "disk") are on
    the meta device until they are needed; its hooks then have the device that they are moved to.

    Raises
    ------
    UnsupportedCallError
        If the weights are on the meta device and nothing brings them.
    """
    device: torch.device = model.device
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", None) or [hook]:
            execution = getattr(part, "execution_device", None)
            if execution is not None:
                return torch.device(execution)
    raise UnsupportedCallError("the model's weights are on the meta device: load them before the model is called")


def synchronise(device: Any) -> None:
    """Wait until a GPU has done its work, so that a clock can be read; other devices, and None, need no waiting."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def module_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of one module by name: brought where they are offloaded, whole where they are sharded."""
    with align_module_device(module):
        weights = {name: weight.detach().clone() for name, weight in module.named_parameters(recurse=False)}
    # FSDP shares a tensor out over processes; every one of them has to ask for the whole.
    return {
        name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight for name, weight in weights.items()
    }


# -- caches -----------------------------------------------------------------------------------------------------------


def new_cache(model: Any) -> DynamicCache:
    """Return an empty cache for a model."""
    return DynamicCache(config=model.config.get_text_config())


def output_cache(output: Any) -> Any:
    """Return the cache in what `generate` or `forward` returned, None where it has none."""
    fields = getattr(type(output), "__dataclass_fields__", {})
    for name in _CACHE_NAMES:
        if name in fields:
            return getattr(output, name)
    return None


def first_keys(cache: Any, least: int = 1) -> Tensor | None:
    """Return the keys (R, H, n, d) of a cache's first layer that has any; None if there are not `least` columns."""
    every = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", None) or ())
    keys = next((keys for keys in every if isinstance(keys, Tensor)), None)
    return keys if keys is not None and keys.ndim == 4 and keys.shape[2] >= least else None


def uses_cache(model: Any, call: Mapping[str, Any]) -> bool:
    """True if a plain forward with these arguments fills a cache."""
    use_cache = call.get("use_cache")
    if use_cache is not None:
        return bool(use_cache)
    configurations = (model.config, model.config.get_text_config())
    return all(getattr(config, "use_cache", True) is not False for config in configurations)


def _checkpointed(layers: Iterable[nn.Module]) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers)


def loses_cache(layers: Iterable[nn.Module]) -> bool:
    """True if decoder layers run without the cache that they are given, because of gradient checkpointing.

    Before 5.24 transformers takes it away whenever a checkpointed model is in training mode, since then only where
    gradients are wanted.
    """
    return _checkpointed(layers) and (minor(transformers.__version__) < (5, 24) or torch.is_grad_enabled())


def repeats_hooks(layers: Iterable[nn.Module]) -> bool:
    """True if backward runs the hooks of decoder layers again after they were removed.

    Before 5.23 transformers checkpoints the call of a layer, hooks included, and not its `forward`.
    """
    return _checkpointed(layers) and torch.is_grad_enabled() and "__call__" in vars(GradientCheckpointingLayer)


# -- attention --------------------------------------------------------------------------------------------------------


FULL, SLIDING = "full_attention", "sliding_attention"
_ATTENTION, _MIXER, _NORMS = "self_attn", "mixer", ("input_layernorm", "operator_norm", "norm")
"""Names in decoder layers: of attention, of whatever a layer has in its place, of the norm before either."""


def attention_of(layer: nn.Module) -> Any:
    """Return the attention of a decoder layer, None of a recurrent one or one with experts alone."""
    mixer = getattr(layer, _MIXER, None)
    return getattr(layer, _ATTENTION, mixer if hasattr(mixer, "k_proj") else None)


def norm_of(layer: nn.Module) -> Any:
    """Return the norm before the attention of a decoder layer.

    Raises
    ------
    UnsupportedTransformersError
        If it has none by a known name.
    """
    for name in _NORMS:
        if hasattr(layer, name):
            return getattr(layer, name)
    unsupported(f"{type(layer).__name__} has no {' or '.join(_NORMS)}")


def layer_kinds(text: Any) -> tuple[str, ...]:
    """Return the kind of every decoder layer of an LLM with configuration `text`, as its cache distinguishes them."""
    count = int(text.num_hidden_layers)
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return tuple(kinds)
    if getattr(text, "sliding_window", None):
        return (SLIDING,) * count
    return (("chunked_attention" if getattr(text, "attention_chunk_size", None) else FULL),) * count


def head_sizes(text: Any) -> list[tuple[int, int]]:
    """Return (width of a head, heads of keys and values) of every decoder layer; some LLMs vary them."""
    layers = getattr(text, "per_layer_config", None) or [text] * int(text.num_hidden_layers)
    return [
        (getattr(one, "head_dim", None) or text.hidden_size // text.num_attention_heads, one.num_key_value_heads)
        for one in layers
    ]


def mlp_width(text: Any) -> int:
    """Return the width of the MLP that a token passes; where a configuration states experts alone, of all it passes."""
    if hasattr(text, "intermediate_size"):
        return int(text.intermediate_size)
    return int(text.num_experts_per_tok * text.moe_intermediate_size + text.shared_expert_intermediate_size)


def window_of(text: Any, layer: int) -> int | None:
    """Return the number of columns that a token sees, itself included; None for all."""
    return int(text.sliding_window) if layer_kinds(text)[layer] == SLIDING else None


def is_flash(config: Any) -> bool:
    """True if a model of this configuration runs flash attention, which takes masks (B, k) or none."""
    return "flash" in str(config._attn_implementation)


def is_eager(config: Any) -> bool:
    """True if a model of this configuration computes whole attention matrices."""
    return bool(config._attn_implementation == "eager")


@contextmanager
def attention_through(config: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Run the attention of modules with this configuration through `function` until the block ends."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def fused_attention(*args: Any, **kwargs: Any) -> Any:
    """Run torch's fused attention with the arguments of an attention function of transformers."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let a model compute attention eagerly, so that its weights can be read, until the block ends."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
