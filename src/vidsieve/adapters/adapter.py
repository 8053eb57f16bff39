"""Pruning a model's inputs before the call: encode each video once, select, rebuild the inputs.

Kept placeholders, kept features, original position ids, and a left-padded mask go to the unmodified model
through its public arguments; nothing inside the model is touched.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from vidsieve.adapters.decoder_layer import layer_state
from vidsieve.adapters.drop import rebuild
from vidsieve.adapters.encoded import Encoded, ImageSpan, Pruned, Template, VideoFeatures, VideoSpan, template_of
from vidsieve.adapters.families.probe import Probed
from vidsieve.adapters.fit import check_fit
from vidsieve.adapters.locate import find_images, find_videos
from vidsieve.adapters.prompt import prompt_around
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import encoder_features, execution_device
from vidsieve.compressors._decoder import LayerState
from vidsieve.compressors.base import Compressor
from vidsieve.errors import NeedError, PromptError, SelectionError, UnknownNameError, UnsupportedCallError
from vidsieve.types import Need, Prompt, Selection, VideoTokens

CONVENTIONS = ("installed", "legacy", "compact")
"""Position conventions: as the installed transformers computes them; as before 5.3 (Qwen: text after a video goes on
behind its last moment too); counted anew over the kept tokens, as vLLM does for families with 1-D positions."""

Videos = Sequence[tuple[int, int]] | None


class Adapter(Probed, ABC):
    """What vidsieve knows of a model family. Subclasses write the five methods below.

    `family` names it in policies, `model_class` is the transformers class; `video_keys` and `image_keys` are the
    arguments that carry videos and still images, pixels first; `modality` is the kind of placeholder that videos
    have; `position_rows` picks the rotary rows out of the model's position ids; `layout` names its token layout;
    `projector` is the place of the module that brings the vision tower's features to the LLM's width.

    Parameters
    ----------
    model : the transformers model
    template : Template, optional
    convention : str
        How positions are counted, one of `CONVENTIONS`.
    """

    family: ClassVar[str]
    model_class: ClassVar[str]
    video_keys: ClassVar[tuple[str, ...]]
    image_keys: ClassVar[tuple[str, ...]]
    modality: ClassVar[Literal["video", "image"]] = "video"
    position_rows: ClassVar[slice] = slice(None)
    layout: ClassVar[str] = "installed"
    projector: ClassVar[str] = "model.multi_modal_projector"
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION, Need.LAYER_ATTENTION})

    def __init__(self, model: Any, template: Template | None = None, convention: str = "installed") -> None:
        if convention not in CONVENTIONS:
            raise UnknownNameError("position convention", convention, CONVENTIONS)
        if convention == "compact" and self.position_rows != slice(None):
            raise UnsupportedCallError(
                f"compact positions are for families that count tokens; {self.family} places them in time and space"
            )
        self.model, self.convention = model, convention
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
    def encoder_outputs(self, rows: Sequence[Tensor], deep: Sequence[Sequence[Tensor]], modality: str) -> Any:
        """Return the model's container of features from the kept rows of each prompt, [(n_b, D), …].

        `deep` has the same per layer, for families with `VideoFeatures.deep`; `modality` is "video" or "image".
        """

    def ready_features(self, video: VideoFeatures) -> dict[str, Any]:
        """Return ``mm_encoder_outputs`` of a prompt with one video that was encoded before; it gives `video` again."""
        outputs = self.encoder_outputs([video.embeds], [[layer] for layer in video.deep], self.modality)
        return {self.modality: outputs}

    def image_features(self, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the features (M, D) of every still image of a batch in placeholder order, and their deep features.

        Raises
        ------
        UnsupportedCallError
            Unless the family says how its images are encoded.
        """
        raise UnsupportedCallError(
            f"images and videos in one call are not supported for {self.family}; send them in separate calls"
        )

    def legacy_positions(self, positions: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return installed positions (rows, B, L) as transformers before 5.3 and vLLM counted them; here the same."""
        return positions

    @property
    def device(self) -> torch.device:
        """Where inputs of the model go: beside its first weights, or where offloaded weights are brought."""
        return execution_device(self.model)

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
    def deep_layers(self) -> int:
        """How many of the LLM's first layers add features of visual tokens after they ran."""
        return 0

    @property
    def language_model(self) -> Any:
        """The LLM inside the model, without its head."""
        return self.model.model.language_model

    @property
    def decoder_layers(self) -> torch.nn.ModuleList:
        """The LLM's decoder layers."""
        layers: torch.nn.ModuleList = self.language_model.layers
        return layers

    def layer_state(self, index: int = 0) -> LayerState:
        """Return shape and weights (copies) of one decoder layer, for policies that start from it.

        Raises
        ------
        NeedError
            If its rotary positions are of a kind that our block does not know.
        """
        return layer_state(self.model.config.get_text_config(), self.decoder_layers[index])

    def template(self) -> Template:
        """Return the chat template's ids.

        Raises
        ------
        NeedError
            If they are not known for this model's tokenizer.
        """
        if self._template is not None:
            return self._template
        return template_of(self.model.config)

    def known_template(self) -> Template | None:
        """Return the chat template's ids, None where they are not known."""
        try:
            return self.template()
        except NeedError:
            return None

    def limit_frames(self, processor: Any, tokens: int) -> None:
        """Make a processor give at most `tokens` tokens a frame; an error where frames have a size of their own."""
        raise UnsupportedCallError(f"frames of {self.family} have a fixed number of tokens: leave the limit out")

    # -- encode ---------------------------------------------------------------------------------------------

    def carries_video(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether pixels or ready features of a video are among the arguments of a call."""
        ready = encoder_features(inputs, "video")
        return ready is not None or inputs.get(self.video_keys[0]) is not None

    def holds_video(self, ids: Tensor) -> bool:
        """Return whether prompts (B, L) hold placeholders of a video."""
        return bool((ids == self.video_token_id).any())

    def carries_image(self, inputs: Mapping[str, Any], ids: Tensor) -> bool:
        """Return whether pixels, ready features or placeholders of an image are among the arguments of a call."""
        ready = encoder_features(inputs, "image")
        given = ready is not None or any(inputs.get(key) is not None for key in self.image_keys[:1])
        return given or self.holds_image(ids)

    def holds_image(self, ids: Tensor) -> bool:
        """Return whether prompts (B, L) hold placeholders of a still image."""
        return bool((ids == self.image_token_id).any())

    def encode(self, inputs: Mapping[str, Any], videos: Videos = None, needs: frozenset[Need] = frozenset()) -> Encoded:
        """Return a batch with its videos encoded and located.

        `videos` names the frames of each video as (first, count) for families whose frames are images; `needs` says
        which signals of the vision encoder are wanted.

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
            raise UnsupportedCallError("leave inputs_embeds out: beside input_ids they would not be pruned with them")
        self.check_videos(videos)
        if not self.carries_video(inputs):
            if inputs.get(self.video_keys[0]) is not None:
                raise PromptError("the prompt holds a single image, which is no video: call the model as it is")
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
        spans, images = self.locate(ids, inputs, videos, needs)
        for span in spans:
            if not bool(mask[span.row, torch.cat([span.columns, span.tail_columns])].bool().all()):
                raise UnsupportedCallError("attention_mask hides video tokens: pruning would bring them back")
            if span.surplus_columns.numel():
                mask = mask.clone()
                mask[span.row, span.surplus_columns] = 0
        given = inputs.get("position_ids")
        if given is not None and self.layout != "installed":
            raise UnsupportedCallError(
                f"leave position_ids out: they count the tokens of another layout than {self.layout!r}"
            )
        positions = self.unpack_positions(given) if given is not None else self._positions(ids, mask, inputs)
        known = {"input_ids", "attention_mask", "position_ids", "mm_encoder_outputs", "mm_token_type_ids"}
        known |= {*self.video_keys, *self.image_keys}
        rest = {k: v for k, v in inputs.items() if k not in known and v is not None}
        return Encoded(ids, mask.bool(), positions.expand(-1, *ids.shape), spans, rest, images)

    def _positions(self, ids: Tensor, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        positions = self.positions(ids, mask, inputs)
        return self.legacy_positions(positions, ids, mask) if self.convention == "legacy" else positions

    def locate(
        self, ids: Tensor, inputs: Mapping[str, Any], videos: Videos, needs: frozenset[Need]
    ) -> tuple[tuple[VideoSpan, ...], tuple[ImageSpan, ...]]:
        """Return every video and every prompt's still images, encoded and found by their placeholders."""
        images: tuple[ImageSpan, ...] = ()
        if self.carries_image(inputs, ids):
            images = find_images(ids, self.image_token_id, *self.image_features(inputs))
        return find_videos(ids, self.video_token_id, self.features(inputs, needs)), images

    def features(self, inputs: Mapping[str, Any], needs: frozenset[Need] = frozenset()) -> list[VideoFeatures]:
        """Return every video of a batch, with the signals of the vision encoder that are needed."""
        videos, found = self.probed(lambda: self.video_features(inputs), inputs, needs)
        if found is None:
            return videos
        starts = accumulate([0, *(video.grid.num_tokens for video in videos)])
        return [
            replace(video, encoder=found.part(start, video.grid.num_tokens))
            for video, start in zip(videos, starts, strict=False)
        ]

    # -- select ---------------------------------------------------------------------------------------------

    def check(self, compressor: Compressor) -> None:
        """Refuse a method that this model cannot serve, before anything runs.

        Raises
        ------
        StageError, NeedError, PolicyMismatchError
        UnsupportedCallError
            If it is no `Compressor`.
        """
        check_fit(self, compressor)

    def check_videos(self, videos: Videos) -> None:
        """Refuse ``videos=`` where it makes no sense.

        Raises
        ------
        UnsupportedCallError
        """
        if videos is not None:
            raise UnsupportedCallError(
                f"videos= is for families whose frames are images; {self.family} tells them itself"
            )

    def video_tokens(self, encoded: Encoded, video: int, needs: frozenset[Need] = frozenset()) -> VideoTokens:
        """Return one video of a batch as compressors read it, with just the signals in `needs`."""
        span = encoded.videos[video]
        positions = encoded.positions[self.position_rows, span.row][:, span.columns].to(span.features.embeds.device)
        prompt = self.prompt(encoded, video) if Need.QUESTION in needs else None
        return VideoTokens(span.features.embeds, span.features.grid, positions, prompt, span.features.encoder)

    def prompt(self, encoded: Encoded, video: int) -> Prompt:
        """Return the whole prompt around one video, padding removed."""
        return prompt_around(self, encoded, video)

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
            budget = selection.num_kept if compressor.adaptive_budget else compressor.budget(video)
            if selection.num_kept != budget or int(selection.indices[-1]) >= video.num_tokens:
                raise SelectionError(
                    f"{compressor.name} kept {selection.num_kept} tokens up to index {int(selection.indices[-1])}; its "
                    f"budget is {budget} of {video.num_tokens}"
                )
            selections.append(selection)
            named = {"method": compressor.name, "variant": compressor.variant, "nominal": str(compressor.retention)}
            trace = VideoTrace.of(span.row, span.features.grid, selection, spent, **named)
            newlines = int(span.features.kept_tail(selection.indices).sum())
            traces.append(replace(trace, newlines=newlines))
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
        return rebuild(self, encoded, selections, range(encoded.input_ids.shape[0]) if rows is None else rows)

    def prune(
        self,
        inputs: Mapping[str, Any],
        compressor: Compressor,
        generator: Generator | None = None,
        videos: Videos = None,
    ) -> Pruned:
        """Return the pruned inputs of a batch: encode, select, rebuild."""
        self.check(compressor)
        encoded = self.encode(inputs, videos, compressor.needs)
        selections, traces = self.select(encoded, compressor, generator)
        return replace(self.build(encoded, encoded.per_row(selections)), traces=tuple(traces))


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
