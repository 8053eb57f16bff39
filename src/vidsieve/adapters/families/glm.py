"""GLM-4.1V, 4.5V, 4.6V and GLM-OCR: frames under the image placeholder, each before its time in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.adapters.transformers_api import encoder_features


class Glm4vAdapter(MropeAdapter):
    """Adapter of `Glm4vForConditionalGeneration`.

    The model itself fills every placeholder of a call from videos or from images, never from both, so that a call with
    both is refused. Pruned videos are handed over as images: `generate` repeats features for beams by the placeholders
    of their modality, and videos have none. Begin and end of each frame and the time after it are always kept.
    """

    family: ClassVar[str] = "glm4v"
    modality: ClassVar[Literal["video", "image"]] = "image"
    shared_placeholder: ClassVar[bool] = True
    image_keys: ClassVar[tuple[str, ...]] = ()

    image_features = Adapter.image_features

    @property
    def video_token_id(self) -> int:
        """The id of an image placeholder, which frames have too."""
        return self.image_token_id

    def carries_image(self, inputs: Mapping[str, Any], ids: Tensor) -> bool:
        """True if a call has pixels or ready features of a still image."""
        return inputs.get("pixel_values") is not None or encoder_features(inputs, "image") is not None

    def holds_image(self, ids: Tensor) -> bool:
        """Return False: pixels tell an image from a video."""
        return False

    def ready_features(self, video: VideoFeatures) -> dict[str, Any]:
        """Return ``mm_encoder_outputs`` of a prompt with one video that was encoded before."""
        return {"video": self.encoder_outputs([video.embeds], [], "video")}

    def kinds(self, input_ids: Tensor) -> Tensor:
        """Return (B, L) int32: 0 text, 2 video."""
        return 2 * (input_ids == self.video_token_id).int()


class Glm46vAdapter(Glm4vAdapter):
    """Adapter of `Glm46VForConditionalGeneration`."""

    family: ClassVar[str] = "glm46v"


class Glm4vMoeAdapter(Glm4vAdapter):
    """Adapter of `Glm4vMoeForConditionalGeneration`: a mixture of experts in most layers."""

    family: ClassVar[str] = "glm4v_moe"


class GlmOcrAdapter(Glm4vAdapter):
    """Adapter of `GlmOcrForConditionalGeneration`."""

    family: ClassVar[str] = "glm_ocr"
