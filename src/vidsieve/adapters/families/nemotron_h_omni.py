"""Nemotron Omni: Mamba, experts, a few layers of full attention; videos are tubelets under the image placeholder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.compressors.base import Compressor
from vidsieve.errors import UnsupportedCallError
from vidsieve.types import Need, Stage, TokenGrid


class NemotronHOmniAdapter(Adapter):
    """Adapter of `NemotronH_Omni_Reasoning_V3`.

    A frame of the grid is a tubelet of two frames. Mamba layers read every token before, so a pruned run equals one of
    the shortened prompt. Audio in the same call stays as it is.
    """

    family: ClassVar[str] = "nemotron_h_omni"
    oldest: ClassVar[str] = "5.24"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_hw")
    shared_placeholder: ClassVar[bool] = True
    projector: ClassVar[str] = "multi_modal_projector"
    lacks: ClassVar[Mapping[Need | Stage, str]] = dict.fromkeys(
        [Stage.FRAME, Stage.ENCODER], "the patches of its tubelets, and the registers before them, are not told apart"
    )

    @property
    def language_model(self) -> Any:
        """The LLM inside the model, without its head."""
        return self.model.language_model.model

    @property
    def video_token_id(self) -> int:
        """The id of an image placeholder: the tokenizer has none for videos."""
        return self.image_token_id

    def holds_image(self, ids: Tensor) -> bool:
        """Return False: pixels tell an image from a video."""
        return False

    def check(self, compressor: Compressor) -> None:
        """Refuse a model that drops video tokens itself, besides what every model is refused for."""
        if self.model.video_pruning_rate > 0:
            raise UnsupportedCallError(
                f"this model drops video tokens itself (Efficient Video Sampling, video_pruning_rate = "
                f"{self.model.video_pruning_rate:g}), after {compressor.name} would: set model.video_pruning_rate = 0"
            )
        super().check(compressor)

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return each video of ``pixel_values_videos`` (videos, T, 2·3, H, W), or of `ready_features`."""
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels = inputs["pixel_values_videos"].to(self.device)
            ready = self.model.get_video_features(pixels, return_dict=True)
            size = self.model.vision_model.patch_size / self.model.config.downsample_ratio
            height, width = (int(side // size) for side in pixels.shape[-2:])
        elif ready.last_hidden_state is not None and ready.last_hidden_state.ndim == 5:
            height, width = ready.last_hidden_state.shape[2:4]
        else:
            raise UnsupportedCallError("features do not tell a frame's height and width: send pixel_values_videos")
        grids = [TokenGrid(len(tokens) // (height * width), height, width) for tokens in ready.pooler_output]
        return [VideoFeatures(v, grid, v[:0]) for v, grid in zip(ready.pooler_output, grids, strict=True)]

    def ready_features(self, video: VideoFeatures) -> dict[str, Any]:
        """Return ``mm_encoder_outputs`` of a prompt with one video, laid out (1, T, H, W, D) to tell its grid."""
        grid = video.grid
        laid_out = video.embeds.view(1, grid.frames, grid.height, grid.width, -1)
        return {"video": BaseModelOutputWithPooling(last_hidden_state=laid_out, pooler_output=[video.embeds])}
