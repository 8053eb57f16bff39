"""Thinkers of Qwen's Omni models: sounds beside videos, and between the tokens of a video that has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.encoded import Encoded, ImageSpan
from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.adapters.families.qwen2_5_vl import Qwen25VLAdapter
from vidsieve.adapters.locate import find_images
from vidsieve.adapters.plan import Plan
from vidsieve.errors import PromptError, UnsupportedCallError
from vidsieve.types import Selection


class Qwen25OmniAdapter(Qwen25VLAdapter):
    """Adapter of `Qwen2_5OmniThinkerForConditionalGeneration`.

    A video's sound takes turns with its frames, by seconds. The sound's tokens stay, where and when they are; every
    layer of the LLM attends to all earlier tokens. Legacy positions are the installed ones.
    """

    family: ClassVar[str] = "qwen2_5_omni"
    oldest: ClassVar[str] = "5.22"
    video_keys: ClassVar[tuple[str, ...]] = (*MropeAdapter.video_keys, "video_second_per_grid")
    audio_keys: ClassVar[tuple[str, ...]] = (
        *("input_features", "feature_attention_mask", "audio_feature_lengths"),
        "use_audio_in_video",
    )

    def rotary(self, input_ids: Tensor, attention_mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return (3, B, L) as the installed `get_rope_index` places frames and sounds in time."""
        seconds, sound = inputs.get("video_second_per_grid"), inputs.get("feature_attention_mask")
        if seconds is None:
            raise PromptError("video_second_per_grid is missing: hand over everything that the processor returned")
        rotary: Tensor = self.model.model.get_rope_index(
            input_ids,
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            attention_mask=attention_mask,
            use_audio_in_video=bool(inputs.get("use_audio_in_video")),
            audio_seqlens=inputs.get("audio_feature_lengths") if sound is None else sound.sum(-1),
            second_per_grids=torch.as_tensor(seconds),
        )[0]
        return rotary

    def legacy_positions(self, positions: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the positions as they are: text after a video goes on after its last moment here."""
        return positions

    def sounds(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[ImageSpan, ...]:
        """Return the sounds of ``input_features`` (sounds, bins, frames)."""
        if inputs.get("input_features") is None:
            return ()
        given = {name: inputs.get(name) for name in self.audio_keys[:3]}
        found = self.model.model.get_audio_features(**given, return_dict=True).last_hidden_state
        return find_images(input_ids, int(self.model.config.audio_token_id), found, kind="sound")

    def holds_sound(self, ids: Tensor) -> bool:
        """True if prompts (B, L) hold placeholders of a sound."""
        return bool((ids == self.model.config.audio_token_id).any())

    def _sounds_of(self, ids: Tensor) -> list[int]:
        """Return the number of sounds of each prompt."""
        counts: list[int] = (ids == self.model.config.audio_start_token_id).sum(1).tolist()
        return counts

    def check_copies(self, input_ids: Tensor, copies: int) -> None:
        """Refuse to repeat a prompt with several sounds, which `generate` would repeat one by one."""
        if copies > 1 and max(self._sounds_of(input_ids)) > 1:
            raise UnsupportedCallError(
                "generate would mix up the sounds of a prompt that has several: leave num_beams and "
                "num_return_sequences at 1, or send prompts with one sound"
            )

    def build(
        self, encoded: Encoded, selections: Sequence[Sequence[Selection]], rows: Sequence[int] | None = None
    ) -> Plan:
        """Return the plan, with the sounds of each output row."""
        plan = super().build(encoded, selections, rows)
        given = {name: value for name, value in encoded.rest.items() if name in self.audio_keys[:3]}
        if rows is None or not given:
            return plan
        of_prompt = torch.split(torch.arange(len(given["input_features"])), self._sounds_of(encoded.input_ids))
        index = torch.cat([of_prompt[row] for row in rows])
        return replace(plan, inputs=plan.inputs | {name: value[index] for name, value in given.items()})


class Qwen3OmniMoeAdapter(Qwen25OmniAdapter):
    """Adapter of `Qwen3OmniMoeThinkerForConditionalGeneration`: experts, deepstack features, times with fractions."""

    family: ClassVar[str] = "qwen3_omni_moe"

    pool_signals = MropeAdapter.pool_signals
