"""Whether a method can act on a model, asked before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidsieve.adapters.layers import block_shape
from vidsieve.adapters.transformers_api import check_layers, check_model
from vidsieve.compressors.base import Compressor, DecodeCompressor, LayerCompressor
from vidsieve.errors import NeedError, PolicyMismatchError, StageError, UnsupportedCallError
from vidsieve.types import Need, Stage, Tokens

if TYPE_CHECKING:
    from vidsieve.adapters.base import Adapter


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
        compressor.first_layer(len(adapter.decoder_layers))
        _check_attention(adapter)
        block_shape(adapter.model.config.get_text_config(), adapter.decoder_layers[0])
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


def _check_attention(adapter: Adapter) -> None:
    """Refuse LLMs some of whose layers do not see the whole prompt."""
    text = adapter.model.config.get_text_config()
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    if other:
        raise UnsupportedCallError(
            f"methods inside the LLM need full attention in every layer, this model has {', '.join(other)}"
        )


def _check_layers(adapter: Adapter, compressor: LayerCompressor) -> None:
    layers = adapter.decoder_layers
    if compressor.retention != 1.0:
        # A count of tokens can be judged where a video's own number is known.
        count = compressor.retention.count if isinstance(compressor.retention, Tokens) else 10**6
        first = compressor.stages(len(layers), count)[0][0]
        if first < adapter.deep_layers:
            raise StageError(
                f"{adapter.family} adds visual features after its first {adapter.deep_layers} layers: "
                f"{compressor.name} cannot drop tokens before layer {adapter.deep_layers}, it wants {first}"
            )
    _check_attention(adapter)
    block_shape(adapter.model.config.get_text_config(), layers[0])  # its rotary positions must be known to us
