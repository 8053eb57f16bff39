"""Pruning a model's inputs before the call: encode each video once, select, rebuild the inputs.

Kept placeholders, kept features, original position ids, and a left-padded mask go to the unmodified model
through its public arguments; nothing inside the model is touched.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.adapters.batch import QWEN_TEMPLATE, Encoded, Pruned, Template, VideoFeatures, VideoSpan
from vidsieve.adapters.trace import VideoTrace
from vidsieve.compressors._decoder import BlockShape, LayerState
from vidsieve.compressors.base import Compressor
from vidsieve.errors import (
    NeedError,
    PolicyMismatchError,
    PromptError,
    SelectionError,
    StageError,
    UnsupportedCallError,
)
from vidsieve.types import Need, Prompt, Selection, Stage, VideoTokens


class Adapter(ABC):
    """What vidsieve knows of a model family. Subclasses write the five methods below.

    `family` names it in policies, `model_class` is the transformers class; `video_keys` are the
    arguments that carry videos; `position_rows` picks the rotary rows out of the model's position ids.
    """

    family: ClassVar[str]
    model_class: ClassVar[str]
    video_keys: ClassVar[tuple[str, ...]]
    image_keys: ClassVar[tuple[str, ...]]
    position_rows: ClassVar[slice] = slice(None)
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION})

    def __init__(self, model: Any, template: Template | None = None) -> None:
        self.model = model
        self._template = template

    @abstractmethod
    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return every video of a batch through the model's own vision tower and projector, in order."""

    @abstractmethod
    def positions(self, input_ids: Tensor, attention_mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the position ids (rows, B, L) int64 that the installed model would use."""

    @abstractmethod
    def pack_positions(self, positions: Tensor) -> Tensor:
        """Return positions (rows, B, L) in the form that the model's forward takes."""

    @abstractmethod
    def unpack_positions(self, position_ids: Tensor) -> Tensor:
        """Return position ids as a caller passed them in the form (rows, B, L)."""

    @abstractmethod
    def encoder_outputs(self, rows: Sequence[Tensor]) -> Any:
        """Return the model's container of video features from the kept rows of each prompt, [(n_b, D), …]."""

    @property
    def hidden_size(self) -> int:
        """D, the width of the LLM."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def video_token_id(self) -> int:
        """The id of a video placeholder."""
        return int(self.model.config.video_token_id)

    @property
    def image_token_id(self) -> int:
        """The id of an image placeholder."""
        return int(self.model.config.image_token_id)

    @property
    def decoder_layers(self) -> torch.nn.ModuleList:
        """The LLM's decoder layers."""
        layers: torch.nn.ModuleList = self.model.model.language_model.layers
        return layers

    def layer_state(self, index: int = 0) -> LayerState:
        """Return shape and weights (copies) of one decoder layer, for policies that start from it.

        Raises
        ------
        NeedError
            If its rotary positions are of a kind that our block does not know.
        """
        text, layer = self.model.config.get_text_config(), self.decoder_layers[index]
        attention: Any = layer.self_attn
        rope = getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") != "default":
            raise NeedError(f"policies do not know rotary positions of type {rope['rope_type']!r}")
        heads = int(text.num_attention_heads)
        shape = BlockShape(
            int(text.hidden_size), heads, int(text.num_key_value_heads),
            int(getattr(text, "head_dim", None) or text.hidden_size // heads), int(text.intermediate_size),
            float(text.rms_norm_eps), float(rope.get("rope_theta", 10000.0)),
            tuple(rope.get("mrope_section") or ()), qkv_bias=attention.q_proj.bias is not None,
            qk_norm=hasattr(attention, "q_norm"),
        )  # fmt: skip
        return LayerState(shape, {k: v.detach().float().clone().cpu() for k, v in layer.state_dict().items()})

    def template(self) -> Template:
        """Return the chat template's ids.

        Raises
        ------
        NeedError
            If they are not known for this model's tokenizer.
        """
        if self._template is not None:
            return self._template
        stated = getattr(self.model.config, "vidsieve_template", None)
        if stated is not None:
            return Template(
                int(stated["turn_start"]), int(stated["turn_end"]), int(stated["user"]), frozenset(stated["ignore"])
            )
        text = self.model.config.get_text_config()
        if text.model_type.startswith("qwen") and text.vocab_size > max(QWEN_TEMPLATE.ignore):
            return QWEN_TEMPLATE
        raise NeedError(
            "this method reads the question, and the chat template of this model is not known: pass "
            "template=vidsieve.Template(turn_start=…, turn_end=…, user=…) with the tokenizer's ids"
        )

    # -- encode ---------------------------------------------------------------------------------------------

    def carries_video(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether pixels or ready features of a video are among the arguments of a call."""
        ready = (inputs.get("mm_encoder_outputs") or {}).get("video")
        return ready is not None or inputs.get(self.video_keys[0]) is not None

    def carries_image(self, inputs: Mapping[str, Any], ids: Tensor) -> bool:
        """Return whether pixels, ready features or placeholders of an image are among the arguments of a call."""
        ready = (inputs.get("mm_encoder_outputs") or {}).get("image")
        given = ready is not None or any(inputs.get(key) is not None for key in self.image_keys)
        return given or bool((ids == self.image_token_id).any())

    def encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """Return a batch with its videos encoded and located.

        Raises
        ------
        PromptError
            If placeholders and videos do not agree.
        UnsupportedCallError
            If images or embeddings come with the videos.
        """
        ids = inputs.get("input_ids")
        if ids is None or inputs.get("inputs_embeds") is not None:
            raise UnsupportedCallError("pass input_ids: a video's tokens cannot be found in embeddings")
        if self.carries_image(inputs, ids):
            raise UnsupportedCallError("images and videos in one call are not supported; send them in separate calls")
        if not self.carries_video(inputs):
            raise PromptError(f"the inputs carry no video ({self.video_keys[0]} is missing); call the model as it is")
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.shape != ids.shape:
            raise UnsupportedCallError(
                f"attention_mask must be {tuple(ids.shape)} as input_ids, got {tuple(mask.shape)}"
            )
        if not bool((ids == self.video_token_id).any()):
            raise PromptError("the prompt has no video placeholder: put the video into the chat message")
        spans = self._locate(ids, self.video_features(inputs))
        for span in spans:
            if not bool(mask[span.row, torch.cat([span.columns, span.tail_columns])].bool().all()):
                raise UnsupportedCallError("attention_mask hides video tokens: pruning would bring them back")
        given = inputs.get("position_ids")
        positions = self.unpack_positions(given) if given is not None else self.positions(ids, mask, inputs)
        positions = positions.expand(-1, *ids.shape)
        known = {"input_ids", "attention_mask", "position_ids", "mm_encoder_outputs", "mm_token_type_ids"}
        rest = {k: v for k, v in inputs.items() if k not in known and k not in self.video_keys and v is not None}
        return Encoded(ids, mask.bool(), positions, spans, rest)

    def _locate(self, ids: Tensor, videos: list[VideoFeatures]) -> tuple[VideoSpan, ...]:
        rows, columns = (ids == self.video_token_id).nonzero(as_tuple=True)
        sizes = [v.grid.num_tokens + v.tail.shape[0] for v in videos]
        if len(rows) != sum(sizes):
            raise PromptError(
                f"the prompt has {len(rows)} video placeholders, its {len(videos)} videos give {sum(sizes)} tokens: "
                "use the processor that belongs to the model, and do not truncate the prompt"
            )
        spans, start = [], 0
        for video, size in zip(videos, sizes, strict=True):
            row, where = rows[start : start + size], columns[start : start + size]
            if int(row[0]) != int(row[-1]):
                raise PromptError("a video's placeholders run from one prompt of the batch into the next")
            split = video.grid.num_tokens
            spans.append(VideoSpan(int(row[0]), where[:split], where[split:], video))
            start += size
        return tuple(spans)

    # -- select ---------------------------------------------------------------------------------------------

    def check(self, compressor: Compressor) -> None:
        """Refuse a method that this model cannot serve, before anything runs.

        Raises
        ------
        StageError, NeedError, PolicyMismatchError
        UnsupportedCallError
            If it is no `Compressor`.
        """
        if not isinstance(compressor, Compressor):
            raise UnsupportedCallError(
                f"a method is needed, not {compressor!r}: make one with vidsieve.load(name, retention=…)"
            )
        if compressor.stage is not Stage.PRE_LLM:
            raise StageError(
                f"{compressor.name} acts {compressor.stage.value}; this version runs methods that act before the LLM"
            )
        for need in compressor.needs - self.provides:
            raise NeedError(f"{compressor.name} needs {need.value}, which the {self.family} adapter does not give")
        config = getattr(getattr(compressor, "policy", None), "config", None)
        if config is not None:
            if config.hidden_size != self.hidden_size:
                raise PolicyMismatchError(
                    f"the {compressor.name} policy was made for width {config.hidden_size}, this model has "
                    f"{self.hidden_size}: train one for it, or load the policy that belongs to it"
                )
            if config.family != self.family:
                raise PolicyMismatchError(
                    f"the {compressor.name} policy was made for the family {config.family}, this model is {self.family}"
                )
        if Need.QUESTION in compressor.needs:
            self.template()

    def video_tokens(self, encoded: Encoded, video: int, needs: frozenset[Need] = frozenset()) -> VideoTokens:
        """Return one video of a batch as compressors read it, with just the signals in `needs`."""
        span = encoded.videos[video]
        positions = encoded.positions[self.position_rows, span.row][:, span.columns].to(span.features.embeds.device)
        prompt = self.prompt(encoded, video) if Need.QUESTION in needs else None
        return VideoTokens(span.features.embeds, span.features.grid, positions, prompt)

    def prompt(self, encoded: Encoded, video: int) -> Prompt:
        """Return the whole prompt around one video, padding removed."""
        row = encoded.videos[video].row
        table = self.model.get_input_embeddings()
        device = table.weight.device
        ids, real = encoded.input_ids[row].to(device), encoded.attention_mask[row].to(device)
        positions = encoded.positions[self.position_rows, row].to(device)
        embeds = table(ids)
        for number in encoded.of_row(row):
            span = encoded.videos[number]
            parts = torch.cat([span.features.embeds, span.features.tail]).to(embeds)
            embeds = embeds.index_copy(0, torch.cat([span.columns, span.tail_columns]).to(device), parts)
        video_mask = torch.zeros_like(real)
        video_mask[encoded.videos[video].columns.to(device)] = True
        question = torch.zeros_like(real)
        question[real] = self.template().question_mask(ids[real])
        return Prompt(embeds[real], positions[:, real], video_mask[real], question[real])

    def select(
        self, encoded: Encoded, compressor: Compressor, generator: Generator | None = None
    ) -> tuple[list[Selection], list[VideoTrace]]:
        """Return what the method keeps of each video, and how long it took."""
        selections, traces = [], []
        for number, span in enumerate(encoded.videos):
            video = self.video_tokens(encoded, number, compressor.needs)
            _synchronise(video.embeds)
            start = time.perf_counter()
            selection = compressor.compress(video, generator=generator)
            _synchronise(video.embeds)
            spent = 1e3 * (time.perf_counter() - start)
            budget = compressor.budget(video)
            if selection.num_kept != budget or int(selection.indices[-1]) >= video.num_tokens:
                raise SelectionError(
                    f"{compressor.name} kept {selection.num_kept} tokens up to index {int(selection.indices[-1])}; its "
                    f"budget is {budget} of {video.num_tokens}"
                )
            selections.append(selection)
            named = {"method": compressor.name, "variant": compressor.variant, "nominal": str(compressor.retention)}
            traces.append(VideoTrace.of(span.row, span.features.grid, selection, spent, **named))
        return selections, traces

    # -- rebuild --------------------------------------------------------------------------------------------

    def build(
        self, encoded: Encoded, selections: Sequence[Sequence[Selection]], rows: Sequence[int] | None = None
    ) -> Pruned:
        """Return the inputs that hold just the selected tokens.

        Parameters
        ----------
        selections : per output row, one Selection for each video of its prompt
        rows : per output row, the prompt of the batch it comes from; default: each prompt once
        """
        rows = range(encoded.input_ids.shape[0]) if rows is None else rows
        kept_columns, features = [], []
        for row, chosen in zip(rows, selections, strict=True):
            keep = encoded.attention_mask[row].clone()
            parts = []
            for number, selection in zip(encoded.of_row(row), chosen, strict=True):
                span = encoded.videos[number]
                keep[span.columns] = False
                keep[span.columns[selection.indices.to(span.columns.device)]] = True
                merged = selection.embeds
                parts.append(span.features.embeds[selection.indices] if merged is None else merged)
                parts.append(span.features.tail)
            kept_columns.append(keep.nonzero().flatten())
            features.append(torch.cat(parts) if parts else None)
        length = max(len(columns) for columns in kept_columns)
        device = encoded.input_ids.device
        kept = torch.full((len(kept_columns), length), -1, dtype=torch.int64, device=device)
        for line, columns in zip(kept, kept_columns, strict=True):
            line[length - len(columns) :] = columns
        index = torch.as_tensor(list(rows), device=device)[:, None]
        real, columns = kept >= 0, kept.clamp(min=0)
        positions = encoded.positions[:, index, columns].masked_fill(~real, 0)
        inputs = dict(encoded.rest) | {
            "input_ids": encoded.input_ids[index, columns].masked_fill(~real, self._pad_id()),
            "attention_mask": real.to(torch.int64),
            "position_ids": self.pack_positions(positions),
            "mm_encoder_outputs": {"video": self.encoder_outputs([f for f in features if f is not None])},
        }
        labels = encoded.rest.get("labels")
        if labels is not None:
            inputs["labels"] = labels[index, columns].masked_fill(~real, -100)
        return Pruned(inputs, kept)

    def _pad_id(self) -> int:
        config = self.model.config.get_text_config()
        pad = getattr(config, "pad_token_id", None)
        return int(pad) if pad is not None else 0

    def prune(self, inputs: Mapping[str, Any], compressor: Compressor, generator: Generator | None = None) -> Pruned:
        """Return the pruned inputs of a batch: encode, select, rebuild."""
        self.check(compressor)
        encoded = self.encode(inputs)
        selections, traces = self.select(encoded, compressor, generator)
        per_row = [[selections[i] for i in encoded.of_row(row)] for row in range(encoded.input_ids.shape[0])]
        return replace(self.build(encoded, per_row), traces=tuple(traces))


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
