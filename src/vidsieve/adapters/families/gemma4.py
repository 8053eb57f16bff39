"""Gemma 4: windows, frames whose tokens see each other both ways, a time and markers around each, per-layer inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vidsieve.adapters.encoded import Encoded, VideoFeatures
from vidsieve.adapters.families.counted import CountedAdapter
from vidsieve.adapters.family import Videos
from vidsieve.adapters.locate import needed
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.front import Front
from vidsieve.errors import NeedError, UnsupportedCallError
from vidsieve.types import ENCODER_NEEDS, Need, Stage, TokenGrid

DIFFERENT = "differ in the sizes of their heads, and share keys and values"


class Gemma4Adapter(CountedAdapter):
    """Adapter of `Gemma4ForConditionalGeneration`.

    Five of six layers see a window of tokens, the kept ones among them, and in it a frame's tokens see each other: a
    pruned run equals one of the shortened prompt. Markers, times and, by default, positions are the whole prompt's, so
    that a window may reach further back in positions than it is wide; under ``positions="compact"`` it may not. What is
    kept of a frame lies between its markers and stays one block; per-layer inputs follow from the ids that are kept.
    """

    family: ClassVar[str] = "gemma4"
    oldest: ClassVar[str] = "5.23"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_position_ids")
    column_keys: ClassVar[tuple[str, ...]] = ("mm_token_type_ids",)
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION}) | ENCODER_NEEDS
    lacks: ClassVar[Mapping[Need | Stage, str]] = {Need.LAYER_ATTENTION: f"its LLM's layers {DIFFERENT}"}
    fronts: ClassVar[frozenset[Stage]] = frozenset({Stage.FRAME, Stage.ENCODER})
    projector: ClassVar[str] = "model.embed_vision"

    def encode(
        self,
        inputs: Mapping[str, Any],
        videos: Videos = None,
        needs: frozenset[Need] = frozenset(),
        front: Front | None = None,
    ) -> Encoded:
        """Return a batch with its videos encoded and located, as `Adapter.encode`; sounds are refused."""
        ids = inputs.get("input_ids")
        if inputs.get("input_features") is not None or (ids is not None and self.holds_sound(ids)):
            raise UnsupportedCallError(
                f"audio and videos in one call are not supported for {self.family}: leave input_features and the "
                "audio out of the prompt, or call the model as it is"
            )
        return super().encode(inputs, videos, needs, front)

    def holds_sound(self, ids: Tensor) -> bool:
        """True if prompts (B, L) hold placeholders of a sound."""
        return bool((ids == self.model.config.audio_token_id).any())

    def patch_side(self) -> int:
        """Return the entries of ``video_position_ids`` along one side of a token."""
        return int(self.model.config.vision_config.pooling_kernel_size)

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return each video of ``pixel_values_videos`` (frames of all, patches, C), or of ready features.

        ``video_position_ids`` (frames, patches, 2) are columns and rows, −1 in padding.
        """
        places = needed(inputs, "video_position_ids", "a video")
        counts = torch.as_tensor(needed(inputs, "num_frames_per_video", "a video"))
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels, given = inputs["pixel_values_videos"].to(self.device), places.to(self.device)
            ready = self.model.model.get_video_features(pixels, given, num_frames_per_video=counts, return_dict=True)
        sizes = ((places.amax(1) + 1) // self.patch_side()).tolist()
        firsts = (counts.cumsum(0) - counts).tolist()
        grids = [TokenGrid(n, *reversed(sizes[first])) for n, first in zip(counts.tolist(), firsts, strict=True)]
        parts = torch.split(torch.cat(list(ready.pooler_output)), [grid.num_tokens for grid in grids])
        return [VideoFeatures(part, grid, part[:0]) for part, grid in zip(parts, grids, strict=True)]

    def frame_cells(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the patches of each video's frames, padding among them."""
        counts = torch.as_tensor(needed(inputs, "num_frames_per_video", "a video"))
        return list(torch.split(inputs["pixel_values_videos"], counts.tolist()))

    def frames_of(self, inputs: Mapping[str, Any], video: int, frames: Tensor) -> dict[str, Any]:
        """Return a call with some frames of one video."""
        counts = torch.as_tensor(inputs["num_frames_per_video"])
        rows = frames + counts[:video].sum().to(frames.device)
        taken = {key: inputs[key][rows.to(inputs[key].device)] for key in self.video_keys[:2]}
        return {**inputs, **taken, "num_frames_per_video": torch.full_like(counts[:1], len(frames))}

    @property
    def projectors(self) -> list[Any]:
        """The last block: what pools its patches takes their places from the call."""
        return [self.model.model.vision_tower.encoder.layers[-1]]

    def _merged(
        self, shown: Callable[[Tensor], dict[str, Any]], count: int, needs: frozenset[Need], front: Front
    ) -> VideoFeatures:
        """Return a video whose frames are merged inside the encoder; their padding is no place of theirs, and goes."""

        def real(frames: Tensor) -> dict[str, Any]:
            inputs = shown(frames)
            kept = (inputs["video_position_ids"][0] >= 0).all(-1)
            return inputs | {key: inputs[key][:, kept.to(inputs[key].device)] for key in self.video_keys[:2]}

        return super()._merged(real, count, needs, front)

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean over each token's patches, by the places of patches in their frame."""
        patches = torch.cat(values)  # (F, patches, C)
        places, side = needed(inputs, "video_position_ids", "a video").to(patches.device), self.patch_side()
        real = (places >= 0).all(-1)
        columns, rows = (places // side).unbind(-1)
        sizes = real.sum(1) // side**2
        first = sizes.cumsum(0) - sizes
        token = first[:, None] + rows * (columns.amax(1, keepdim=True) + 1) + columns
        sums = torch.zeros(int(sizes.sum()), patches.shape[-1], device=patches.device)
        return sums.index_add(0, token[real], patches[real].float()) / side**2

    def layer_shape(self, index: int = 0) -> BlockShape:
        """Refuse: no layer of this LLM is one of the blocks that policies and teachers compute."""
        raise NeedError(
            f"policies and teachers do not know the layers of {self.family}, which {DIFFERENT}: train a policy that "
            "starts from no layer (score, cacovid with body 'question' and start 'nothing', sieve with taught=false), "
            "without a teacher"
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (…, V) of the LLM's last hidden states (…, D), bent to stay below a cap."""
        cap = self.model.config.get_text_config().final_logit_softcapping
        logits = super().logits(hidden)
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Gemma4UnifiedAdapter(Gemma4Adapter):
    """Adapter of `Gemma4UnifiedForConditionalGeneration`: no vision tower, a token is one large patch."""

    family: ClassVar[str] = "gemma4_unified"
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION})
    fronts: ClassVar[frozenset[Stage]] = frozenset()
    lacks: ClassVar[Mapping[Need | Stage, str]] = {
        **Gemma4Adapter.lacks,
        **dict.fromkeys([*ENCODER_NEEDS, Stage.FRAME, Stage.ENCODER], "it has no vision tower"),
    }

    def patch_side(self) -> int:
        """Return 1: the processor merges patches."""
        return 1

    def check_fixed_cache(self) -> None:
        """Refuse it where a frame's tokens see each other.

        In layers with full attention they do so in the model's `forward`, and not under the masks that `generate`
        makes for such a cache: the stock model gives other logits on it.
        """
        if self.model.config.get_text_config().use_bidirectional_attention == "vision":
            raise UnsupportedCallError(
                f"generate masks the frames of {self.family} otherwise on a cache of fixed length (static) than on one "
                "that grows, and the model answers otherwise: leave cache_implementation out, or pass a DynamicCache"
            )
