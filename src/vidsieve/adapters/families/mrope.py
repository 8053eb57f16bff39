"""Families with positions in time, height and width (M-RoPE) that the model's own `get_rope_index` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.locate import needed, runs
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.errors import PromptError
from vidsieve.types import ENCODER_NEEDS, Need, Stage, TokenGrid


class MropeAdapter(Adapter):
    """Base of families whose vision tower merges patches of ``video_grid_thw`` (videos, 3) to T × H/m × W/m tokens.

    Position ids have four rows, as the model makes them for `generate`: text, time, height, width. The
    last three are the rotary ones. Deep features of the encoder, where it gives them, are pruned like the tokens that
    they belong to.
    """

    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw")
    provides: ClassVar[frozenset[Need]] = Adapter.provides | ENCODER_NEEDS
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    position_rows: ClassVar[slice] = slice(1, 4)
    tower: ClassVar[str] = "model.visual"
    projector: ClassVar[str] = "model.visual.merger"
    fronts: ClassVar[frozenset[Stage]] = frozenset({Stage.FRAME, Stage.ENCODER})

    def limit_frames(self, processor: Any, tokens: int) -> None:
        """Make a processor give at most `tokens` tokens a frame, by the pixels that it scales frames to.

        Processors since Qwen3-VL bound the pixels of a whole video: `vidsieve.answering.chat` multiplies theirs by its
        frames.
        """
        reader = processor.video_processor
        most = tokens * (reader.patch_size * reader.merge_size) ** 2
        reader.vidsieve_frame_pixels = most if bounds_videos(reader) else None
        reader.size = type(reader.size)(**(dict(reader.size) | {"longest_edge": most}))
        reader.size["shortest_edge"] = min(reader.size["shortest_edge"], most)

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return each video of ``pixel_values_videos`` by ``video_grid_thw`` (videos, 3), or of ready features."""
        grids = inputs.get("video_grid_thw")
        if grids is None:
            raise PromptError(
                "video_grid_thw is missing: hand over everything that the processor returned, and call model.generate "
                "itself, not the function of its class"
            )
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels = inputs["pixel_values_videos"].to(self.device)
            ready = self.model.model.get_video_features(pixels, grids, return_dict=True)
        shapes = self._shapes(grids)
        sizes = [grid.num_tokens for grid in shapes]
        parts = torch.split(torch.cat(list(ready.pooler_output)), sizes)
        deep = [torch.split(layer, sizes) for layer in deep_features(ready)]
        return [
            VideoFeatures(part, grid, part[:0], tuple(layer[number] for layer in deep))
            for number, (part, grid) in enumerate(zip(parts, shapes, strict=True))
        ]

    def _shapes(self, grids: Tensor) -> list[TokenGrid]:
        """Return the token grids of videos of ``video_grid_thw`` (videos, 3)."""
        vision = self.model.config.vision_config
        merge, across = vision.spatial_merge_size, getattr(vision, "temporal_merge_size", 1)
        return [TokenGrid(t // across, h // merge, w // merge) for t, h, w in grids.tolist()]

    def frame_cells(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the patches of each temporal step, a cell for each token: the patches that are merged to it."""
        grids = needed(inputs, "video_grid_thw", "a video")
        parts = torch.split(inputs["pixel_values_videos"], grids.prod(1).tolist())
        shapes = [(shape.frames, shape.per_frame) for shape in self._shapes(grids)]
        return [part.reshape(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]

    def frames_of(self, inputs: Mapping[str, Any], video: int, frames: Tensor) -> dict[str, Any]:
        """Return a call with the patches of some temporal steps of one video."""
        grids = inputs["video_grid_thw"]
        pixels = torch.split(inputs["pixel_values_videos"], grids.prod(1).tolist())[video]
        grid = grids[video : video + 1].clone()
        grid[0, 0] = grid[0, 0] // self._shapes(grid)[0].frames * len(frames)
        steps = pixels.reshape(self._shapes(grids)[video].frames, -1, pixels.shape[-1])
        pixels = steps[frames.to(pixels.device)].flatten(0, 1)
        return {**inputs, "pixel_values_videos": pixels, "video_grid_thw": grid}

    def image_features(self, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the images of ``pixel_values`` by ``image_grid_thw`` (images, 3), or of ready features."""
        ready = encoder_features(inputs, "image")
        if ready is None:
            pixels = needed(inputs, "pixel_values").to(self.device)
            grids = needed(inputs, "image_grid_thw")
            ready = self.model.model.get_image_features(pixels, grids, return_dict=True)
        return torch.cat(list(ready.pooler_output)), tuple(deep_features(ready))

    def positions(self, input_ids: Tensor, attention_mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return (4, B, L): text positions, and what the installed model's `get_rope_index` gives."""
        text = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return torch.cat([text[None], self.rotary(input_ids, attention_mask, inputs)])

    def rotary(self, input_ids: Tensor, attention_mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return (3, B, L): time, height and width by the installed model's `get_rope_index`."""
        if inputs.get("mm_token_type_ids") is None:
            # The installed model would fall back to 1-D positions without a word.
            raise PromptError("mm_token_type_ids is missing: hand over everything that the processor returned")
        index = self.model.model.get_rope_index
        wanted = signature(index).parameters.keys() & {*self.video_keys, *self.image_keys}
        grids = {key: inputs.get(key) for key in wanted}
        kinds = self.kinds(input_ids)
        rotary: Tensor = index(input_ids, mm_token_type_ids=kinds, attention_mask=attention_mask, **grids)[0]
        return rotary

    def kinds(self, input_ids: Tensor) -> Tensor:
        """Return (B, L) int32: 0 text, 1 image, 2 video."""
        return 2 * (input_ids == self.video_token_id).int() + (input_ids == self.image_token_id).int()

    def legacy_positions(self, positions: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return positions (4, B, L) in which what follows a video goes on after its largest row, time included."""
        moved = positions.clone()
        kinds = self.kinds(input_ids)
        for row in range(input_ids.shape[0]):
            columns = attention_mask[row].bool().nonzero().flatten()
            cursor = 0
            for run in runs(kinds[row, columns]):
                part = columns[run]
                # Height starts where the part does; time of a video may run ahead of it.
                block = positions[1:, row, part] - positions[2, row, part[0]]
                moved[1:, row, part] = block + cursor
                cursor += int(block.max()) + 1
        return moved

    def pack_positions(self, positions: Tensor) -> Tensor:
        """Return (4, B, L)."""
        return positions

    def unpack_positions(self, position_ids: Tensor) -> Tensor:
        """Return (4, B, L) from (4, B, L), or from (3, B, L) with the text row counted."""
        if position_ids.ndim != 3 or position_ids.shape[0] not in (3, 4):
            raise PromptError(f"position_ids must be (3, B, L) or (4, B, L), got {tuple(position_ids.shape)}")
        if position_ids.shape[0] == 4:
            return position_ids
        text = torch.arange(position_ids.shape[-1], device=position_ids.device).expand_as(position_ids[:1])
        return torch.cat([text, position_ids])

    @property
    def projectors(self) -> list[Any]:
        """The merger, and those of deep features."""
        tower = self.model.get_submodule(self.projector.rpartition(".")[0])
        return [*super().projectors, *getattr(tower, "deepstack_merger_list", ())]

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean over each token's patches, which follow each other."""
        merge = self.model.config.vision_config.spatial_merge_size**2
        patches = torch.cat([some.flatten(0, 1) for some in values])
        tokens: Tensor = patches.reshape(-1, merge, patches.shape[-1]).float().mean(1)
        return tokens

    @property
    def deep_layers(self) -> int:
        """Number of first LLM layers that get deep features."""
        return len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", ()))

    def encoder_outputs(
        self, rows: Sequence[Tensor], deep: Sequence[Sequence[Tensor]], modality: str
    ) -> BaseModelOutputWithPooling:
        """Return the features, and each layer's deep features likewise where there are any."""
        if not deep:
            return super().encoder_outputs(rows, deep, modality)
        layers = [list(layer) for layer in deep]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=list(rows), deepstack_features=layers)


def bounds_videos(reader: Any) -> bool:
    """True if a video processor scales the frames of a longer video down further."""
    side, most = 4 * reader.patch_size * reader.merge_size, (4 * reader.patch_size * reader.merge_size) ** 2
    size = {"shortest_edge": 1, "longest_edge": 2 * most}
    videos = [torch.zeros(frames, 3, side, side, dtype=torch.uint8) for frames in (2, 8)]
    grids = reader(videos, do_sample_frames=False, return_tensors="pt", size=size)["video_grid_thw"]
    return not torch.equal(grids[0, 1:], grids[1, 1:])


def deep_features(ready: Any) -> list[Tensor]:
    """Return the deep features of an encoder's output, one tensor (N, D) a layer; none for most families."""
    return [torch.cat(list(layer)) for layer in getattr(ready, "deepstack_features", None) or []]
