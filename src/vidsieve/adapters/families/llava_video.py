"""LLaVA-Video as it was trained: ⌊s/2⌋ × ⌊s/2⌋ averaged tokens a frame, a newline after each row of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.families.llava_onevision import LlavaOnevisionAdapter, layer_options
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.errors import UnsupportedCallError
from vidsieve.types import TokenGrid


class LlavaVideoAdapter(LlavaOnevisionAdapter):
    """Adapter of `LlavaOnevisionForConditionalGeneration` with ``layout="grid"``.

    Converted LLaVA-Video checkpoints load as the LLaVA-OneVision class, which pools frames of 27×27 patches to 14×14
    tokens and closes the whole video with one newline. The original code averages 2×2 patches to 13×13 tokens and
    puts a newline after each row: 182 tokens a frame. The processor's prompt has room for 196 a frame; the
    placeholders too many are left out. A newline stays where its row keeps a token, as FastVID and HoliTom do it.
    """

    family: ClassVar[str] = "llava_video"
    layout: ClassVar[str] = "grid"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vision = self.model.config.vision_config
        self._patches = int(vision.image_size // vision.patch_size)
        if self._patches % 2 == 0:
            raise UnsupportedCallError(
                f"layout='grid' is for towers with an odd number of patches a side, as LLaVA-Video's 27; this has "
                f"{self._patches}, whose grid would not fit the prompt"
            )

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return each video of ``pixel_values_videos`` (videos, T, 3, H, W), or of `ready_features`.

        Raises
        ------
        UnsupportedCallError
            For other ready features, which are pooled already.
        """
        side = self._patches // 2
        ready: Any = encoder_features(inputs, "video")
        if getattr(ready, "vidsieve_layout", None) == self.layout:
            videos = [video.reshape(-1, side + 1, video.shape[-1]) for video in ready.pooler_output]
            return [self._video(lines[:, :side], lines[:, side]) for lines in videos]
        pixels = inputs.get("pixel_values_videos")
        if pixels is None or ready is not None:
            raise UnsupportedCallError("layout='grid' needs the video's pixels: ready features are pooled already")
        count, frames = pixels.shape[:2]
        projected = self._projected(pixels.flatten(0, 1).to(self.device, self.model.dtype), inputs)
        tokens = averaged(projected, self._patches).reshape(count, frames * side, side, -1)
        newlines = self.model.model.image_newline.to(tokens).expand(frames * side, -1)
        return [self._video(lines, newlines) for lines in tokens]

    def _video(self, lines: Tensor, newlines: Tensor) -> VideoFeatures:
        """Return a video of rows of tokens (T·side, side, D), each with its newline (T·side, D)."""
        side = lines.shape[1]
        grid = TokenGrid(len(lines) // side, side, side)
        return VideoFeatures(lines.flatten(0, 1), grid, newlines, per_row=True, surplus=self.surplus(grid.frames))

    def surplus(self, frames: int) -> int:
        """Return the placeholders that the installed layout has too many: those of its larger grid, and its newline."""
        side = self._patches // 2
        return frames * (side + 1) ** 2 + 1 - frames * side * (side + 1)

    def ready_features(self, video: VideoFeatures) -> dict[str, Any]:
        """Return the video (1, N + T·side, D), a newline after each row, marked as of this layout."""
        lines = torch.cat([video.embeds.reshape(len(video.tail), video.grid.width, -1), video.tail[:, None]], 1)
        outputs = BaseModelOutputWithPooling(pooler_output=lines.flatten(0, 1)[None])
        outputs.vidsieve_layout = self.layout
        return {"video": outputs}

    def _projected(self, pixels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return every patch of frames (F, 3, H, W) through tower and projector, (F, n, D)."""
        config, chosen = self.model.config, layer_options(inputs)
        layer = chosen.get("vision_feature_layer", config.vision_feature_layer)
        strategy = chosen.get("vision_feature_select_strategy", config.vision_feature_select_strategy)
        hidden = self.model.model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        layers = [layer] if isinstance(layer, int) else layer
        features = torch.cat([hidden[number] for number in layers], -1)
        projected: Tensor = self.model.model.multi_modal_projector(features[:, int(strategy == "default") :])
        return projected

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return patches averaged to tokens as features are."""
        return torch.cat([averaged(some.float(), self._patches).flatten(0, 1) for some in values])


def averaged(patches: Tensor, side: int) -> Tensor:
    """Return (F, ⌊side/2⌋², C): the mean of each 2×2 block of patches (F, side², C); an odd last row and column go."""
    planes = patches.reshape(patches.shape[0], side, side, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(planes, 2).flatten(2).transpose(1, 2)
