"""Base of the model families: the facts that each file in `families` states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, ClassVar, Literal, TypeVar

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.encoded import ImageSpan, VideoFeatures, VideoSpan
from vidsieve.adapters.front import merging, sources
from vidsieve.adapters.locate import find_images, find_videos
from vidsieve.adapters.probe import Signals, attention_modules, listening, signals
from vidsieve.adapters.template import Template
from vidsieve.adapters.transformers_api import encoder_features, execution_device
from vidsieve.compressors.front import EncoderFront, FrameFront, Front
from vidsieve.errors import NeedError, StageError, UnknownNameError, UnsupportedCallError, UnsupportedModelError
from vidsieve.io import versions
from vidsieve.types import ENCODER_NEEDS, EncoderOutputs, Need, Stage

T = TypeVar("T")

CONVENTIONS = ("installed", "legacy", "compact")
"""Position conventions: as the installed transformers computes them; as before 5.3 (Qwen: text after a video continues
after its last moment too); counted again over the kept tokens, as vLLM does for families with 1-D positions."""

Videos = Sequence[tuple[int, int]] | None


class Family(ABC):
    """Facts about a model family.

    A new family sets `family` and `video_keys`, writes `video_features`, and overrides what differs. The model's
    `forward` must take ``mm_encoder_outputs``: features that are encoded already, by modality.

    Attributes
    ----------
    family : str
        Its name in policies.
    oldest : str
        First minor release of transformers whose model of this family runs as its tests ask.
    definition : {"masked", "shortened"}
        What a pruned run equals: a run of the whole prompt with the dropped tokens masked, or, where layers do more
        than attend to every earlier token, a fresh run of the stock model on the shortened prompt at the same places.
    video_keys, image_keys : tuple of str
        Arguments that carry videos and still images, pixels first; families without still images leave the second out.
    audio_keys : tuple of str
        Arguments that carry sounds, features first; sounds reach the model as they are, and are never pruned.
    column_keys : tuple of str
        Further arguments (B, L) of the model's `forward`, a value a token, that pruned prompts need too.
    modality : str
        Kind of placeholder that videos have.
    shared_placeholder : bool
        True if still images have the same placeholder: the pixels of a call tell which it is.
    position_rows : slice
        Rows of the model's position ids that its rotary embedding reads.
    layout : str
        Name of its token layout.
    flat : frozenset of str
        Modalities whose features the model takes as one tensor (N, 1, D), which beams repeat row by row; of others it
        takes a tensor for each prompt.
    tower : str
        Path of the vision tower.
    projector : str
        Path of the module that projects the vision tower's features to the width of the LLM.
    provides : frozenset of Need
        Signals that methods can read.
    lacks : mapping of Need or Stage to str
        Why it does not provide a signal, where that is not plain, or has no such stage among `fronts`; ends a sentence.
    cls_token : bool
        True if the vision tower has a class token.
    fronts : frozenset of Stage
        Where methods may act before the encoder's output: `Stage.FRAME` where `frame_cells` and `frames_of` say how
        the pixels of independent frames are told apart, `Stage.ENCODER` where frames are the rows of `encoder_blocks`,
        or follow each other there with the same rotary positions.

    Parameters
    ----------
    model : the transformers model
    template : Template, or the error that there is none, optional
        Default: the attribute ``vidsieve_template`` of the model, which `load_model` sets.
    convention : str
        One of `CONVENTIONS`.

    Raises
    ------
    UnsupportedModelError
        If the installed transformers is older than `oldest`.
    UnknownNameError, UnsupportedCallError
        For a convention that does not exist, or not for this family.
    """

    family: ClassVar[str]
    oldest: ClassVar[str] = versions.TESTED["transformers"][0]
    definition: ClassVar[Literal["masked", "shortened"]] = "masked"
    video_keys: ClassVar[tuple[str, ...]]
    image_keys: ClassVar[tuple[str, ...]] = ()
    audio_keys: ClassVar[tuple[str, ...]] = ()
    column_keys: ClassVar[tuple[str, ...]] = ()
    modality: ClassVar[Literal["video", "image"]] = "video"
    shared_placeholder: ClassVar[bool] = False
    position_rows: ClassVar[slice] = slice(None)
    layout: ClassVar[str] = "installed"
    flat: ClassVar[frozenset[str]] = frozenset()
    tower: ClassVar[str] = "model.vision_tower"
    projector: ClassVar[str] = "model.multi_modal_projector"
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION, Need.LAYER_ATTENTION})
    lacks: ClassVar[Mapping[Need | Stage, str]] = {}
    cls_token: ClassVar[bool] = False
    fronts: ClassVar[frozenset[Stage]] = frozenset()

    def __init__(self, model: Any, template: Template | NeedError | None = None, convention: str = "installed") -> None:
        if reason := self.too_old():
            raise UnsupportedModelError(reason)
        if convention not in CONVENTIONS:
            raise UnknownNameError("position convention", convention, CONVENTIONS)
        if convention == "compact" and self.position_rows != slice(None):
            raise UnsupportedCallError(
                f"compact positions are for families that count tokens; {self.family} places them in time and space"
            )
        self.model, self.convention = model, convention
        self._template = template or getattr(model, "vidsieve_template", None)

    @classmethod
    def too_old(cls) -> str:
        """Return in words why the installed transformers cannot run this family; "" if it can."""
        here = transformers.__version__
        if versions.minor(here) >= versions.minor(cls.oldest):
            return ""
        return f"{cls.family} needs transformers {cls.oldest} or newer, and {here} is installed: update transformers"

    @abstractmethod
    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return every video of a batch, encoded by the model's vision tower and projector, in order."""

    def encoder_outputs(
        self, rows: Sequence[Tensor], deep: Sequence[Sequence[Tensor]], modality: str
    ) -> BaseModelOutputWithPooling:
        """Return the model's container of features from the kept rows of each prompt, [(n_b, D), …].

        `deep` has the same per layer, for families with `VideoFeatures.deep`; `modality` is "video" or "image".
        """
        features = torch.cat(list(rows))[:, None] if modality in self.flat else list(rows)
        return BaseModelOutputWithPooling(pooler_output=features)

    def positions(self, input_ids: Tensor, attention_mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the position ids (rows, B, L) int64 that the installed model would use; here real tokens counted."""
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[None]

    def pack_positions(self, positions: Tensor) -> Tensor:
        """Return positions (rows, B, L) in the form that the model's forward takes; here (B, L)."""
        return positions[0]

    def unpack_positions(self, position_ids: Tensor) -> Tensor:
        """Return position ids in the form (rows, B, L) from the form that the model's forward takes."""
        return position_ids[None]

    def ready_features(self, video: VideoFeatures) -> dict[str, Any]:
        """Return ``mm_encoder_outputs`` of a prompt with one video that was encoded before."""
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

    def sounds(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[ImageSpan, ...]:
        """Return every prompt's sounds, encoded and located by their placeholders; most families have none."""
        return ()

    def check_copies(self, input_ids: Tensor, copies: int) -> None:
        """Refuse prompts that `generate` cannot repeat `copies` times; most families have none.

        Raises
        ------
        UnsupportedCallError
        """
        return

    def check_fixed_cache(self) -> None:
        """Refuse `generate` on a cache of fixed length where transformers masks such prompts otherwise; most are alike.

        Raises
        ------
        UnsupportedCallError
        """
        return

    def legacy_positions(self, positions: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return installed positions (rows, B, L) as transformers before 5.3 and vLLM counted them; here the same."""
        return positions

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs: that of its first weights, or the one that offloaded weights are moved to."""
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

    def words(self, ids: Tensor) -> Tensor:
        """Return the embeddings (…, D) of ids, any for visual placeholders, which may have none of their own."""
        visual = (ids == self.video_token_id) | (ids == self.image_token_id)
        embeds: Tensor = self.model.get_input_embeddings()(ids.masked_fill(visual, 0))
        return embeds

    @property
    def deep_layers(self) -> int:
        """Number of first LLM layers after which features of visual tokens are added."""
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (…, V) that the model gives for the LLM's last hidden states (…, D)."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def template(self) -> Template:
        """Return the chat template's ids.

        Raises
        ------
        NeedError
            If they are not known, or the processor's chat template does not tell them.
        """
        if isinstance(self._template, Template):
            return self._template
        raise self._template or NeedError(
            "this method reads the question, and the chat template of this model is not known: pass "
            "template=vidsieve.Template.of(processor)"
        )

    def known_template(self) -> Template | None:
        """Return the chat template's ids, None where they are not known."""
        try:
            return self.template()
        except NeedError:
            return None

    def limit_frames(self, processor: Any, tokens: int) -> None:
        """Make a processor give at most `tokens` tokens a frame; an error where the number is fixed."""
        raise UnsupportedCallError(f"frames of {self.family} have a fixed number of tokens: leave the limit out")

    def carries_video(self, inputs: Mapping[str, Any]) -> bool:
        """True if the arguments of a call have pixels or ready features of a video."""
        ready = encoder_features(inputs, "video")
        return ready is not None or inputs.get(self.video_keys[0]) is not None

    def holds_video(self, ids: Tensor) -> bool:
        """True if prompts (B, L) hold placeholders of a video."""
        return bool((ids == self.video_token_id).any())

    def carries_image(self, inputs: Mapping[str, Any], ids: Tensor) -> bool:
        """True if the arguments of a call have pixels, ready features or placeholders of a still image."""
        ready = encoder_features(inputs, "image")
        given = ready is not None or any(inputs.get(key) is not None for key in self.image_keys[:1])
        return given or self.holds_image(ids)

    def holds_image(self, ids: Tensor) -> bool:
        """True if prompts (B, L) hold placeholders of a still image."""
        return bool((ids == self.image_token_id).any())

    def holds_sound(self, ids: Tensor) -> bool:
        """True if prompts (B, L) hold placeholders of a sound."""
        return False

    def locate(
        self,
        ids: Tensor,
        inputs: Mapping[str, Any],
        videos: Videos,
        needs: frozenset[Need],
        front: Front | None = None,
    ) -> tuple[tuple[VideoSpan, ...], tuple[ImageSpan, ...]]:
        """Return every video and every prompt's still images, encoded and located by their placeholders."""
        images = self.locate_images(ids, inputs)
        return find_videos(ids, self.video_token_id, self.features(inputs, needs, front)), images

    def locate_images(self, ids: Tensor, inputs: Mapping[str, Any]) -> tuple[ImageSpan, ...]:
        """Return the still images of every prompt, encoded and located by their placeholders."""
        if not self.carries_image(inputs, ids):
            return ()
        return find_images(ids, self.image_token_id, *self.image_features(inputs))

    def features(
        self, inputs: Mapping[str, Any], needs: frozenset[Need] = frozenset(), front: Front | None = None
    ) -> list[VideoFeatures]:
        """Return every video of a batch, with the signals of the vision encoder that are needed."""
        if front is not None:
            return self._fronted(inputs, needs, front)
        videos, probe = self.probed(lambda: self.video_features(inputs), inputs, needs)
        if probe is None:
            return videos
        starts = accumulate([0, *(video.grid.num_tokens for video in videos)])
        return [
            replace(video, encoder=probe.part(start, video.grid.num_tokens))
            for video, start in zip(videos, starts, strict=False)
        ]

    # -- before and inside the encoder ------------------------------------------------------------------------

    def check_front(self, front: Front | None, inputs: Mapping[str, Any] | None = None) -> None:
        """Refuse a method that acts before the encoder's output where this family, or the call, does not let it.

        Raises
        ------
        UnsupportedCallError
        """
        if front is None:
            return
        if front.stage not in self.fronts:
            known = front.stage in self.lacks
            reason = self.lacks[front.stage] if known else "it does not say how frames are told apart there"
            raise UnsupportedCallError(
                f"{front.name} acts {front.stage.value}, and the {self.family} adapter does not let it ({reason}): "
                "leave it out, or choose a method that acts before the LLM"
            )
        given = inputs or {}
        if any(encoder_features(given, modality) is not None for modality in {"video", self.modality}):
            raise UnsupportedCallError(
                f"{front.name} acts {front.stage.value}, and the call brings ready features: send the video's pixels"
            )

    def frame_cells(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return by video the pixels (T, C, V) of its frames: V values of each of the C cells that a frame has.

        A frame is one of the grid's, and encoded without regard to others. A cell is what becomes one token, or, where
        tokens are pooled from overlapping patches, one patch.
        """
        raise NotImplementedError(f"{self.family} has fronts {self.fronts} and no frame_cells")

    def frames_of(self, inputs: Mapping[str, Any], video: int, frames: Tensor) -> dict[str, Any]:
        """Return the arguments of a call that has the `frames` (T',) int64 of one video alone."""
        raise NotImplementedError(f"{self.family} has fronts {self.fronts} and no frames_of")

    def encoder_blocks(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the blocks of the vision tower, (F, S, d) → (F, S, d), up to the last that the projector reads.

        Blocks without attention that follow the last one with attention are read too.
        """
        attention = self.probe_point(inputs)[1]
        stacks = (list(module) for module in self.model.modules() if isinstance(module, torch.nn.ModuleList))
        for stack in stacks:
            number = next((n for n, block in enumerate(stack) if attention in block.children()), None)
            if number is not None:
                later = (n for n, block in enumerate(stack) if n > number and attention_modules(block))
                return stack[: next(later, len(stack))]
        raise UnsupportedCallError(f"the vision encoder of {self.family} is no list of blocks that hold its attention")

    @property
    def projectors(self) -> list[Any]:
        """What reads the output of blocks of the vision tower, whatever the number of rows."""
        return [self.model.get_submodule(self.projector)]

    def surplus(self, frames: int) -> int:
        """Return the number of placeholders of a video of `frames` that stand for nothing; most families have none."""
        return 0

    def _fronted(self, inputs: Mapping[str, Any], needs: frozenset[Need], front: Front) -> list[VideoFeatures]:
        """Return every video of a batch, encoded one by one under a method before or inside the encoder."""
        self.check_front(front, inputs)
        videos = []
        for number, frames in enumerate(self.frame_cells(inputs)):
            if isinstance(front, FrameFront):
                kept, places = sources(front, frames)
                (video,) = self.features(self.frames_of(inputs, number, kept), needs)
                video = replace(video.at_frames(places), surplus=self.surplus(len(frames)), encoded=len(kept))
            else:
                video = self._merged(partial(self.frames_of, inputs, number), len(frames), needs, front)
            videos.append(video)
        return videos

    def _merged(
        self, shown: Callable[[Tensor], dict[str, Any]], count: int, needs: frozenset[Need], front: Front
    ) -> VideoFeatures:
        """Return a video of `count` frames that a method merges inside the encoder.

        `shown` returns the arguments of a call that has some frames (T',) int64 of it alone.
        """
        if not isinstance(front, EncoderFront):
            raise StageError(f"{front.name} acts {front.stage.value}: derive it from FrameFront or EncoderFront")
        inputs = shown(torch.arange(count))
        blocks, seen = self.encoder_blocks(inputs), dict(inputs)
        if front.listens(len(blocks)) is not None:
            needs -= {Need.ENCODER_ATTENTION}

        def pooled(attention: Tensor) -> Tensor:
            return self.pool_signals([attention[..., None]], shown(torch.arange(len(attention))))[:, 0]

        def encode() -> list[VideoFeatures]:
            videos = self.video_features(inputs)
            seen.update(shown(left.frames))
            return videos

        with merging(
            front,
            blocks,
            self.projectors,
            count,
            config=self.probe_point(inputs)[0],
            layers=len(self.decoder_layers),
            per_frame=cache(lambda patches: len(pooled(torch.zeros(1, patches)))),
            cls_token=self.cls_token,
        ) as left:
            ((video,), probe) = self.probed(encode, seen, needs)
        whole, short = video.grid, video.at_frames(left.frames)
        signals = short.encoder
        if probe is not None:
            # Of a block before all merging, signals are of all frames.
            told = replace(video, encoder=probe.part(0, whole.num_tokens))
            signals = (told.at_frames(left.frames) if len(probe.attention) == whole.num_tokens else told).encoder
        if left.attention is not None:
            keys = None if signals is None else signals.keys
            signals = EncoderOutputs(pooled(left.attention), keys, left.segments)
        return replace(short, encoder=signals, frames=left.frames, whole=whole)

    def probe_point(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the vision tower's configuration and the attention module of the block whose output is projected.

        Here the last block that has attention.
        """
        if not self.provides & ENCODER_NEEDS:
            raise NeedError(f"the {self.family} adapter gives no signals of the vision encoder")
        return self.model.config.vision_config, attention_modules(self.model.get_submodule(self.tower))[-1]

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return (M, C), one row an LLM token, from values (F, patches, C) of every call of the probed block."""
        raise NeedError(f"the {self.family} adapter gives no signals of the vision encoder")

    def probed(
        self, encode: Callable[[], T], inputs: Mapping[str, Any], needs: frozenset[Need]
    ) -> tuple[T, Signals | None]:
        """Run the vision tower; return its output and the signals that are needed (None: none are)."""
        if not needs & ENCODER_NEEDS:
            return encode(), None
        config, module = self.probe_point(inputs)
        with listening(config, module) as notes:
            output = encode()
        return output, signals(notes, self.cls_token, lambda values: self.pool_signals(values, inputs))

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
