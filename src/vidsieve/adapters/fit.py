"""Whether a method can act on a model, asked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vidsieve.adapters.decoder_layer import block_shape
from vidsieve.adapters.transformers_api import FULL, check_layers, check_model, layer_kinds
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.inside import DecodeCompressor, LayerCompressor
from vidsieve.errors import NeedError, PolicyMismatchError, StageError, UnsupportedCallError
from vidsieve.types import Need, Stage, Tokens

if TYPE_CHECKING:
    from vidsieve.adapters.adapter import Adapter


def check_fit(adapter: Adapter, compressor: Compressor) -> None:
    """Refuse a method that a model cannot serve.

    Raises
    ------
    UnsupportedCallError
        If it is no `Compressor`.
    StageError, NeedError, BudgetError
        If it acts, or reads what the model does not give, or keeps less than it can.
    PolicyMismatchError
        If its policy was made for another width or family.
    """
    if not isinstance(compressor, Compressor):
        raise UnsupportedCallError(
            f"a method is needed, not {compressor!r}: make one with vidsieve.load(name, retention=…)"
        )
    check_model(adapter.model)
    if compressor.acts is not Stage.PRE_LLM:
        check_layers(adapter.decoder_layers)
    for need in compressor.needs - adapter.provides:
        raise NeedError(f"{compressor.name} needs {need.value}, which the {adapter.family} adapter does not give")
    if isinstance(compressor, LayerCompressor) and compressor.acts is Stage.LAYER:
        _check_layers(adapter, compressor)
    if isinstance(compressor, DecodeCompressor) and compressor.acts is Stage.DECODE:
        text = adapter.model.config.get_text_config()
        # It reads the cached keys of the layer before its first one too.
        first = compressor.first_layer(len(adapter.decoder_layers)) - 1
        _check_full(compressor, layer_kinds(text), first, "read the cache")
        block_shape(text, adapter.decoder_layers[0])
    config = getattr(getattr(compressor, "policy", None), "config", None)
    if config is not None:
        if config.hidden_size != adapter.hidden_size:
            raise PolicyMismatchError(
                f"the {compressor.name} policy was made for width {config.hidden_size}, this model has "
                f"{adapter.hidden_size}: train one for it, or load the policy that belongs to it"
            )
        if config.family != adapter.family:
            raise PolicyMismatchError(
                f"the {compressor.name} policy was made for the family {config.family}, this model is {adapter.family}"
            )
    if Need.QUESTION in compressor.needs:
        adapter.template()


def _check_layers(adapter: Adapter, compressor: LayerCompressor) -> None:
    """Refuse to drop tokens at, or before, a layer that would not run right on what is left."""
    layers, kinds = adapter.decoder_layers, layer_kinds(adapter.model.config.get_text_config())
    block_shape(adapter.model.config.get_text_config(), layers[0])  # its rotary positions must be known to us
    if compressor.retention == 1.0:
        return
    # A count of tokens can be judged where a video's own number is known.
    count = compressor.retention.count if isinstance(compressor.retention, Tokens) else 10**6
    first = compressor.stages(len(layers), count)[0][0]
    if first < adapter.deep_layers:
        raise StageError(
            f"{adapter.family} adds visual features after its first {adapter.deep_layers} layers: {compressor.name} "
            f"cannot drop tokens before layer {adapter.deep_layers}, it wants {first}"
        )
    _check_full(compressor, kinds, first, "drop tokens")


def _check_full(compressor: Compressor, kinds: Sequence[str], first: int, what: str) -> None:
    """Refuse an LLM that has other layers than full attention from layer `first` on.

    Those before may slide: they see the whole prompt, or what a part before the LLM leaves of it.
    """
    other = [number for number, kind in enumerate(kinds) if kind != FULL]
    if not other or other[-1] < first:
        return
    names = ", ".join(sorted({kinds[number] for number in other}))
    if other[-1] + 1 >= len(kinds):
        raise UnsupportedCallError(
            f"{compressor.name} needs full attention in every layer from the first that it changes on, and the last "
            f"layer of this model has {names}: choose a method that acts before the LLM"
        )
    which = ", ".join(map(str, other))
    raise UnsupportedCallError(
        f"{compressor.name} would {what} from layer {first} on, and this model has {names} in layer {which}: layers "
        f"from {other[-1] + 1} on can be used, or a method that acts before the LLM"
    )
