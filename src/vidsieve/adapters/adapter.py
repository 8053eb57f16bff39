"""Pruning a batch of prompts: encode each video once, select, and build the shorter inputs.

Kept placeholders, kept features, original position ids, and a left-padded mask go to the unmodified model
through its public arguments. Methods inside the LLM add hooks to its layers for the length of a call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Generator, Tensor

from vidsieve.adapters.decoder_layer import Decoder, block_shape, check_rotary, layer_state
from vidsieve.adapters.drop import gathered, kept_columns
from vidsieve.adapters.encoded import Encoded, ImageSpan, VideoFeatures, VideoSpan
from vidsieve.adapters.family import Family, Videos
from vidsieve.adapters.fingerprint import model_digest, policy_digest
from vidsieve.adapters.inside.decoding import DecodeRun
from vidsieve.adapters.inside.hooks import InnerRun
from vidsieve.adapters.inside.layers import LayerRun
from vidsieve.adapters.inside.view import place
from vidsieve.adapters.locate import find_videos
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import FULL, SLIDING, check_layers, check_model, layer_kinds, synchronise
from vidsieve.compressors._decoder import BlockShape, LayerState
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.calibrated import Calibrated
from vidsieve.compressors.front import Front
from vidsieve.compressors.inside import DecodeCompressor, InnerCompressor, LayerCompressor, layers_in_words
from vidsieve.errors import (
    NeedError,
    PolicyMismatchError,
    PromptError,
    RetentionError,
    SelectionError,
    StageError,
    UnsupportedCallError,
)
from vidsieve.types import Need, Prompt, Selection, Stage, Tokens, VideoTokens

Method = TypeVar("Method", bound=Compressor)


class Adapter(Family):
    """The way from a batch of prompts to a pruned one, for the model of a family."""

    def encode(
        self,
        inputs: Mapping[str, Any],
        videos: Videos = None,
        needs: frozenset[Need] = frozenset(),
        front: Front | None = None,
    ) -> Encoded:
        """Return a batch with its videos encoded and located.

        `videos` names the frames of each video as (first, count) for families whose frames are images; `needs` says
        which signals of the vision encoder are wanted, `front` what acts before or inside it.

        Raises
        ------
        PromptError
            If placeholders and videos do not agree.
        UnsupportedCallError
            If embeddings come with the videos, or images where the family does not know how to encode them.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            raise UnsupportedCallError("pass input_ids: a video's tokens cannot be found in embeddings")
        if inputs.get("inputs_embeds") is not None:
            raise UnsupportedCallError("leave inputs_embeds out: vidsieve prunes input_ids and would not prune them")
        self.check_videos(videos)
        if not self.carries_video(inputs):
            if inputs.get(self.video_keys[0]) is not None:
                raise PromptError("the prompt holds a single image, which is not a video: call the model as it is")
            raise PromptError(f"the inputs carry no video ({self.video_keys[0]} is missing); call the model as it is")
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.shape != ids.shape:
            raise UnsupportedCallError(
                f"attention_mask must be {tuple(ids.shape)} as input_ids, got {tuple(mask.shape)}"
            )
        if not self.holds_video(ids):
            raise PromptError("the prompt has no video placeholder: put the video into the chat message")
        return self._encoded(inputs, mask, *self.locate(ids, inputs, videos, needs, front))

    def encode_shared(self, inputs: Mapping[str, Any], video: VideoFeatures) -> Encoded:
        """Return a batch of prompts about one video, encoded already, for a family that counts positions by columns."""
        spans = find_videos(inputs["input_ids"], self.video_token_id, [video] * len(inputs["input_ids"]))
        return self._encoded(inputs, inputs["attention_mask"], spans, ())

    def _encoded(
        self, inputs: Mapping[str, Any], mask: Tensor, spans: tuple[VideoSpan, ...], images: tuple[ImageSpan, ...]
    ) -> Encoded:
        """Return a batch whose videos and images are located."""
        ids, whole = inputs["input_ids"], mask
        for span in spans:
            if not bool(mask[span.row, torch.cat([span.columns, span.tail_columns])].bool().all()):
                raise UnsupportedCallError("attention_mask hides video tokens: pruning would bring them back")
            if span.surplus_columns.numel():
                mask = mask.clone()
                mask[span.row, span.surplus_columns] = 0
                # Of the surplus, frames that the encoder merged have had their positions.
                whole = whole.clone()
                whole[span.row, span.surplus_columns[len(span.surplus_columns) - span.features.surplus :]] = 0
        given = inputs.get("position_ids")
        if given is not None and self.layout != "installed":
            raise UnsupportedCallError(
                f"leave position_ids out: they count the tokens of another layout than {self.layout!r}"
            )
        positions = self.unpack_positions(given) if given is not None else self._positions(ids, whole, inputs)
        known = {"input_ids", "attention_mask", "position_ids", "mm_encoder_outputs", "mm_token_type_ids"}
        known |= {*self.video_keys, *self.image_keys}
        known -= {*self.column_keys}
        rest = {k: v for k, v in inputs.items() if k not in known and v is not None}
        return Encoded(ids, mask.bool(), positions.expand(-1, *ids.shape), spans, rest, images)

    def encode_for(self, inputs: Mapping[str, Any], method: Compressor | None, videos: Videos = None) -> Encoded:
        """Return a batch encoded as a method needs it: with its signals, and what acts before it; None: as it is."""
        if method is None:
            return self.encode(inputs, videos)
        return self.encode(inputs, videos, method.needs, method.front)

    def _positions(self, ids: Tensor, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        positions = self.positions(ids, mask, inputs)
        return self.legacy_positions(positions, ids, mask) if self.convention == "legacy" else positions

    def video_tokens(self, encoded: Encoded, video: int, needs: frozenset[Need] = frozenset()) -> VideoTokens:
        """Return one video of a batch as compressors read it, with just the signals in `needs`."""
        span = encoded.videos[video]
        positions = encoded.positions[self.position_rows, span.row][:, span.columns].to(span.features.embeds.device)
        prompt = self.prompt(encoded, video) if Need.QUESTION in needs else None
        features = span.features
        return VideoTokens(features.embeds, features.grid, positions, prompt, features.encoder, features.whole)

    def prompt(self, encoded: Encoded, video: int) -> Prompt:
        """Return the whole prompt around one video of a batch, padding removed, on the video's device."""
        row, target = encoded.videos[video].row, encoded.videos[video].features.embeds.device
        table = self.model.get_input_embeddings()
        # Offloaded weights are on the meta device until the table is called.
        device = table.weight.device if table.weight.device.type != "meta" else target
        ids, real = encoded.input_ids[row].to(device), encoded.attention_mask[row].to(device)
        positions = encoded.positions[self.position_rows, row].to(device)
        embeds = self.words(ids)
        for image in (*encoded.images, *self.sounds(encoded.input_ids, encoded.rest)):
            if image.row == row:
                embeds = embeds.index_copy(0, image.columns.to(device), image.embeds.to(embeds))
        for number in encoded.of_row(row):
            span = encoded.videos[number]
            parts = torch.cat([span.features.embeds, span.features.tail]).to(embeds)
            embeds = embeds.index_copy(0, torch.cat([span.columns, span.tail_columns]).to(device), parts)
        video_mask = torch.zeros_like(real)
        video_mask[encoded.videos[video].columns.to(device)] = True
        question = torch.zeros_like(real)
        place = real.long().cumsum(0) - 1
        videos = [place[encoded.videos[number].columns.to(device)] for number in encoded.of_row(row)]
        question[real] = self.template().question_mask(ids[real], videos)
        # On the video's device: the model's parts may lie on several.
        whole = embeds[real], positions[:, real], video_mask[real], question[real]
        return Prompt(*(part.to(target) for part in whole))

    # -- methods ----------------------------------------------------------------------------------------------

    def check(self, compressor: Compressor) -> None:
        """Refuse a method that this model cannot serve, before anything runs.

        Raises
        ------
        UnsupportedCallError
            If it is not a `Compressor`.
        StageError, NeedError, BudgetError
            If it acts where this model does not let it, reads what the model does not give, or keeps less than it can.
        PolicyMismatchError
            If its policy was trained for another width or family.
        RetentionError
            If its retention was calibrated with another model or policy.
        """
        if not isinstance(compressor, Compressor):
            raise UnsupportedCallError(
                f"a method is needed, not {compressor!r}: make one with vidsieve.load(name, retention=…)"
            )
        check_model(self.model)
        for need in sorted(compressor.needs - self.provides, key=lambda need: need.name):
            if need is not Need.LAYER_ATTENTION or compressor.acts is not Stage.PRE_LLM:
                raise self._lacking(compressor, need)
        self.check_front(compressor.front)
        if compressor.acts is not Stage.PRE_LLM:
            check_layers(self.decoder_layers)
            kinds = layer_kinds(self.model.config.get_text_config())
            check_rotary(self.rotary_embedding, self.layer_shape(kinds.index(FULL) if FULL in kinds else 0), FULL)
        if isinstance(compressor, LayerCompressor) and compressor.acts is Stage.LAYER:
            self._check_layers(compressor)
        if isinstance(compressor, DecodeCompressor) and compressor.acts is Stage.DECODE:
            self._check_cuts(compressor, "read fewer tokens")
        if isinstance(compressor, Calibrated):
            self._check_rule(compressor)
        config = getattr(getattr(compressor, "policy", None), "config", None)
        if config is not None:
            if config.hidden_size != self.hidden_size:
                raise PolicyMismatchError(
                    f"the {compressor.name} policy was trained for width {config.hidden_size}, this model has "
                    f"{self.hidden_size}: train one for it, or load the policy that belongs to it"
                )
            if config.family != self.family:
                raise PolicyMismatchError(
                    f"the {compressor.name} policy was trained for the family {config.family}, this model is "
                    f"{self.family}"
                )
        if Need.QUESTION in compressor.needs:
            self.template()

    def _check_rule(self, compressor: Calibrated) -> None:
        """Refuse a rule that was made with another policy or model: its bound is not of these."""
        rule = compressor.rule
        if rule.policy_digest != policy_digest(compressor):
            raise RetentionError(
                f"the rule was calibrated with other weights of {compressor.title}: run `vidsieve calibrate` for this "
                "policy, or give a fixed retention"
            )
        if rule.model_digest != model_digest(self.model):
            raise RetentionError(
                f"the rule was calibrated with {rule.model or 'a model'}, and this is another model, or it has another "
                "precision, layout or positions: run `vidsieve calibrate` with it, or give a fixed retention"
            )

    def _lacking(self, compressor: Compressor, need: Need) -> NeedError:
        """Return the error that a method reads what this family does not provide, and what to choose instead."""
        inner = need is Need.LAYER_ATTENTION
        causes: list[Need | Stage] = [need] if compressor.front is None else [need, compressor.front.stage]
        causes = [cause for cause in causes if cause in self.lacks]
        reason = f" ({self.lacks[causes[0]]})" if causes else ""
        others = "a method that acts before the LLM" if inner else "a method that reads the video's tokens alone"
        part = (
            ", or the part of this one before the LLM (inner=False)" if inner and hasattr(compressor, "inner") else ""
        )
        return NeedError(
            f"{compressor.name} needs {need.value}, which the {self.family} adapter does not give{reason}: choose "
            f"{others}, as divprune{part}"
        )

    def _check_layers(self, compressor: LayerCompressor) -> None:
        """Refuse to drop tokens at or before a layer that would not run correctly on the remaining ones."""
        if compressor.retention == 1.0:
            return
        front = compressor.front
        if front is not None and front.stage is Stage.ENCODER and compressor.outer(len(self.decoder_layers)) is None:
            raise StageError(
                f"{compressor.name} has no part before the LLM, and would not count the frames that {front.name} merges"
            )
        first = self._check_cuts(compressor, "drop tokens")
        if first < self.deep_layers:
            raise StageError(
                f"{self.family} adds visual features after its first {self.deep_layers} layers: {compressor.name} "
                f"cannot drop tokens before layer {self.deep_layers}, it wants {first}"
            )

    def _check_cuts(self, compressor: LayerCompressor | DecodeCompressor, what: str) -> int:
        """Return the first layer from which on there are fewer tokens; refuse one from which there cannot be."""
        depth, cuts = len(self.decoder_layers), self.cuts(compressor)
        if cuts == ():
            self._refuse_layer(compressor, 0, cuts, what)
        method = self.fitted(compressor)
        if isinstance(method, LayerCompressor):
            # A token count can only be checked against a known video.
            count = method.retention.count if isinstance(method.retention, Tokens) else 10**6
            layers = [layer for layer, _ in method.stages(depth, count)]
        else:
            layers = [method.first_layer(depth)]
        for layer in layers:
            if cuts is not None and layer not in cuts:
                self._refuse_layer(compressor, layer, cuts, what)
        return layers[0]

    def _refuse_layer(self, compressor: InnerCompressor, layer: int, cuts: Sequence[int], what: str) -> NoReturn:
        kinds = layer_kinds(self.model.config.get_text_config())
        others = {kind: [n for n, one in enumerate(kinds) if one == kind] for kind in kinds if kind != FULL}
        has = " and ".join(f"{kind} in {layers_in_words(where)}" for kind, where in others.items())
        full = [number for number, kind in enumerate(kinds) if kind == FULL]
        if cuts:
            raise UnsupportedCallError(
                f"{compressor.name} would {what} from layer {layer} on, and this model has {has}: "
                f"{layers_in_words(cuts, len(kinds))} can be used, or a method that acts before the LLM"
            )
        ends = self.definition == "masked" and kinds[-1] != FULL
        why = f"full attention in {layers_in_words(full) if full else 'none'}, {has}"
        raise UnsupportedCallError(
            f"{compressor.name} needs a layer of full attention with further ones behind it, and "
            f"{f'the last layer of this model has {kinds[-1]}' if ends else f'this model has {why}'}: choose a method "
            "that acts before the LLM"
        )

    @property
    def rotary_embedding(self) -> Any:
        """The module that makes cosines and sines from positions for the LLM's layers; None if it has none."""
        return getattr(self.language_model, "rotary_emb", None)

    def cuts(self, compressor: InnerCompressor) -> tuple[int, ...] | None:
        """Return the layers from which on this LLM lets a method have fewer tokens; None: all but the first.

        The layer whose attention chooses them, `lookback` layers earlier, must have full attention. In families of
        definition "masked" all layers from there on must, and the one that is read may slide; in the others, layers of
        other kinds run on the tokens that are left, and one with a cache of keys must come first, which counts all.
        """
        kinds, back = layer_kinds(self.model.config.get_text_config()), compressor.lookback
        other = [number for number, kind in enumerate(kinds) if kind != FULL]
        if not other:
            return None
        decodes, shortened = isinstance(compressor, DecodeCompressor), self.definition == "shortened"
        attends = [number for number, kind in enumerate(kinds) if kind in (FULL, SLIDING)]
        readable = (FULL,) if decodes or shortened else (FULL, SLIDING)
        first = (attends[0] if shortened and attends else other[-1]) + 1
        cuts = [cut for cut in range(first, len(kinds)) if kinds[cut - back] in readable]
        return tuple(cut for cut in cuts if FULL in kinds[cut:] or not decodes)

    def fitted(self, compressor: Method) -> Method:
        """Return a method whose own choice of layers is among those that this LLM lets it use."""
        if not isinstance(compressor, InnerCompressor) or compressor.acts is Stage.PRE_LLM:
            return compressor
        cuts = self.cuts(compressor)
        return compressor.fitted(cuts) if cuts else compressor

    @property
    def first_full_layer(self) -> int:
        """The first decoder layer whose attention reaches the whole prompt.

        Raises
        ------
        NeedError
            If there is none.
        """
        kinds = layer_kinds(self.model.config.get_text_config())
        if FULL not in kinds:
            raise NeedError(f"no layer of this model has full attention, only {', '.join(sorted(set(kinds)))}")
        return kinds.index(FULL)

    def layer_shape(self, index: int = 0) -> BlockShape:
        """Return the shape of one decoder layer; raises as `layer_state`, without its copies of weights."""
        return block_shape(self.model.config.get_text_config(), self.decoder_layers[index])

    def layer_state(self, index: int = 0) -> LayerState:
        """Return shape and weights (copies) of one decoder layer, for policies that start from it.

        Raises
        ------
        NeedError
            If its rotary positions or its norms are of a kind that our block does not know.
        """
        check_rotary(self.rotary_embedding, self.layer_shape(index))
        return layer_state(self.model.config.get_text_config(), self.decoder_layers[index])

    def select(
        self, encoded: Encoded, compressor: Compressor | None, generator: Generator | None = None
    ) -> tuple[list[Selection], list[VideoTrace]]:
        """Return the tokens of each video that enter the LLM, and the traces of a method that chooses them.

        Without a method, and for one whose parts all act inside the LLM, these are all tokens, without a trace.
        """
        outer = compressor
        if compressor is not None and compressor.acts is not Stage.PRE_LLM:
            outer = self.fitted(compressor).outer(len(self.decoder_layers))
        if outer is None:
            return encoded.everything(), []
        selections, traces = [], []
        for number, span in enumerate(encoded.videos):
            video = self.video_tokens(encoded, number, outer.needs)
            synchronise(video.embeds.device)
            start = time.perf_counter()
            selection = outer.compress(video, generator=generator)
            synchronise(video.embeds.device)
            spent = 1e3 * (time.perf_counter() - start)
            budget = selection.num_kept if outer.adaptive_budget else outer.budget(video)
            if selection.num_kept != budget or int(selection.indices[-1]) >= video.num_tokens:
                raise SelectionError(
                    f"{outer.name} kept {selection.num_kept} tokens up to index {int(selection.indices[-1])}; its "
                    f"budget is {budget} of {video.num_tokens}"
                )
            selections.append(selection)
            trace = VideoTrace.of(
                span.row,
                span.features.grid,
                selection,
                spent,
                method=outer.title,
                variant=outer.variant,
                nominal=str(outer.retention),
                encoded=span.features.encoded,
                frames=span.features.frames,
                whole=span.features.whole,
            )
            newlines = int(span.features.kept_tail(selection.indices).sum())
            traces.append(replace(trace, newlines=newlines))
        return selections, traces

    def build(
        self, encoded: Encoded, selections: Sequence[Sequence[Selection]], rows: Sequence[int] | None = None
    ) -> Plan:
        """Return the plan of running prompts with just the selected tokens.

        Parameters
        ----------
        selections : per output row, one Selection for each video of its prompt
        rows : per output row, the prompt of the batch it comes from; default: each prompt once
        """
        rows = range(encoded.input_ids.shape[0]) if rows is None else rows
        kept = kept_columns(encoded, selections, rows)
        features = gathered(encoded, selections, rows, self.modality)
        index = torch.as_tensor(list(rows), device=kept.device)[:, None]
        real, columns = kept >= 0, kept.clamp(min=0)
        positions = encoded.positions[:, index, columns].masked_fill(~real, 0)
        if self.convention == "compact":
            positions = (real.long().cumsum(1) - 1).clamp(min=0)[None]
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        inputs: dict[str, Any] = dict(encoded.rest) | {
            "input_ids": encoded.input_ids[index, columns].masked_fill(~real, 0 if pad is None else int(pad)),
            "attention_mask": real.to(torch.int64),
            "position_ids": self.pack_positions(positions),
            "mm_encoder_outputs": {
                modality: self.encoder_outputs(
                    [piece.embeds for piece in pieces],
                    [[piece.deep[layer] for piece in pieces] for layer in range(len(pieces[0].deep))],
                    modality,
                )
                for modality, pieces in features.items()
                if pieces
            },
        }
        for name in self.column_keys:
            values = encoded.rest.get(name)
            if values is None:
                raise PromptError(f"{name} is missing: hand over everything that the processor returned")
            inputs[name] = values[index, columns].masked_fill(~real, 0)
        labels = encoded.rest.get("labels")
        if labels is not None:
            if labels.shape != encoded.input_ids.shape:
                raise UnsupportedCallError(
                    f"labels must be {tuple(encoded.input_ids.shape)} as input_ids, got {tuple(labels.shape)}"
                )
            # The first token of a row has no token before it; padding, now on the left, must not predict it.
            first = real & (real.long().cumsum(1) == 1)
            inputs["labels"] = labels[index, columns].masked_fill(~real | first, -100)
        return Plan(inputs, kept)

    def plan(
        self,
        encoded: Encoded,
        compressor: Compressor | None = None,
        generator: Generator | None = None,
        selected: tuple[Sequence[Selection], Sequence[VideoTrace]] | None = None,
    ) -> Plan:
        """Return the plan of running a batch under a method, wherever in the LLM it acts; None: with all tokens.

        Parameters
        ----------
        encoded : Encoded
        compressor : Compressor, optional
        generator : torch.Generator, optional
            Source of randomness for methods that draw.
        selected : optional
            What `select` returned for these videos before; default: it is called here.

        Raises
        ------
        BudgetError, NeedError
        """
        selections, traces = self.select(encoded, compressor, generator) if selected is None else selected
        plan = self.build(encoded, encoded.per_row(selections))
        run = None if compressor is None else self._begin(encoded, plan, compressor, selections, traces)
        return replace(plan, selections=tuple(selections), selected=tuple(traces), run=run, _acting=self.acting)

    def _begin(
        self,
        encoded: Encoded,
        plan: Plan,
        compressor: Compressor,
        selections: Sequence[Selection],
        traces: Sequence[VideoTrace],
    ) -> InnerRun | None:
        """Return the run of a method's part inside the LLM; None where it has none."""
        if compressor.acts is Stage.PRE_LLM:
            return None
        compressor = self.fitted(compressor)
        positions = self.unpack_positions(plan.inputs["position_ids"])
        videos = place(encoded, plan.kept_positions, selections)
        rotary, real, depth = positions[self.position_rows], plan.kept_positions >= 0, len(self.decoder_layers)
        if isinstance(compressor, LayerCompressor):
            spent = tuple(trace.select_ms for trace in traces)
            return LayerRun(compressor, rotary, real, videos, depth, spent)
        if isinstance(compressor, DecodeCompressor):
            first, kinds = compressor.first_layer(depth), layer_kinds(self.model.config.get_text_config())
            readers = tuple(number for number in range(first, depth) if kinds[number] == FULL)
            return DecodeRun(compressor, rotary, real, videos, first, readers, positions[0], tuple(traces))
        raise StageError(f"{compressor.name} acts {compressor.acts.value}: derive it from a base class of that stage")

    def acting(
        self, run: InnerRun | None, cache: Any = None, words: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Let the run of a method act inside this model's LLM while a block runs; see `InnerRun.hooked`."""
        if run is None:
            return nullcontext()
        decoder = Decoder(list(self.decoder_layers), self.model.config.get_text_config(), self.rotary_embedding)
        return run.hooked(decoder, cache, words)

    def prune(
        self,
        inputs: Mapping[str, Any],
        compressor: Compressor,
        generator: Generator | None = None,
        videos: Videos = None,
    ) -> Plan:
        """Return the plan of running a batch of the processor's outputs: check, encode, select, build."""
        self.check(compressor)
        return self.plan(self.encode_for(inputs, compressor, videos), compressor, generator)
