"""Qwen2.5-VL in vLLM, by the route of vLLM's own video pruning: embeddings that carry their positions.

Kept tokens stay where they were in time and space, and the text after a video goes on after its largest position, as
vLLM has it without pruning (``positions="legacy"`` under transformers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl as theirs
from vllm.multimodal import MULTIMODAL_REGISTRY

from vidsieve.serving.vllm_processing import PruningProcessor
from vidsieve.serving.vllm_shared import Selector, Shadow, settings_of
from vidsieve.types import TokenGrid


class Processor(PruningProcessor, theirs.Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    """vLLM's processor with as many placeholders as tokens stay."""

    token_field = "video_token_id"

    def tokens_of(self, place: int, items: Any, fields: Any) -> tuple[int, int]:
        """Return a video's grid tokens; it has none outside."""
        grid = fields["video"][place]["video_grid_thw"].data if "video" in fields else fields["video_grid_thw"][place]
        return int(grid.prod()) // self.info.get_hf_config().vision_config.spatial_merge_size ** 2, 0


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=theirs.Qwen2_5_VLProcessingInfo, dummy_inputs=theirs.Qwen2_5_VLDummyInputsBuilder
)
class Qwen25VL(theirs.Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model; a video's embeddings are cut to what stays before they are cached."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self._vidsieve = settings_of(vllm_config.model_config.hf_config)
        if self._vidsieve is not None:
            # vLLM's own pruning is what makes its runner read positions from the embeddings.
            vllm_config.model_config.multimodal_config.video_pruning_rate = 0.5
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._shadow: Shadow | None = None
        self._reaches: dict[tuple[Any, ...], int] = {}
        self._selector: Selector | None = None
        self._asked: dict[str, Any] = {}

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the embeddings of every image and video, the latter pruned, with four columns of positions."""
        self._asked = {name: kwargs.pop(name, None) for name in PruningProcessor.fields}
        return super().embed_multimodal(**kwargs)

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: Sequence[Tensor], video_input: Any
    ) -> tuple[Tensor, ...]:
        if self._vidsieve is None:
            return tuple(super()._postprocess_video_embeds_evs(video_embeds_split, video_input))
        if self._selector is None:
            self._selector = Selector(self._vidsieve, self._shape(video_embeds_split[0].device))
        seconds = video_input.get("second_per_grid_ts")
        found = []
        for place, (video, thw) in enumerate(
            zip(video_embeds_split, video_input["video_grid_thw"].tolist(), strict=True)
        ):
            count, prompt = PruningProcessor.read(self._asked, place)
            rate = None if seconds is None else float(seconds[place])
            indices, kept, positions = self._selector(
                video, self._grid(thw), count, prompt, inputs=_placed_by(thw, rate)
            )
            block = _from_zero(positions)[:, indices.to(positions.device)].T.to(video.device)
            found.append(torch.cat([kept, block, block[:, :1]], 1))  # the fourth column is vLLM's, not read here
        return tuple(found)

    # -- positions --------------------------------------------------------------------------------------------
    # vLLM finds out positions behind a pruned video when its embeddings are gathered. Where these are not, as the video
    # is in the prefix cache, or only a part of the prompt is computed, that goes wrong (0.32). How far a video reaches
    # depends on its grid alone: text gets its positions at once, and kept tokens theirs when they come.

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return positions (3, L) of a prompt, right for its text, and how far they run ahead of its length."""
        if self._vidsieve is None:
            return tuple(super().get_mrope_input_positions(input_tokens, mm_features))
        length, cursor, place = len(input_tokens), 0, 0
        rows = torch.zeros(3, length, dtype=torch.int64)
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            start, span = feature.mm_position.offset, feature.mm_position.length
            rows[:, place:start] = torch.arange(cursor, cursor + start - place)
            cursor += start - place
            rows[:, start : start + span] = cursor
            cursor += self._reach(feature)
            place = start + span
        rows[:, place:] = torch.arange(cursor, cursor + length - place)
        return rows, cursor - place

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:  # fmt: skip
        """Return embeddings without their columns, and positions with those of the tokens that they stand for."""
        if self._vidsieve is None:
            found = super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
            return tuple(found)
        rows = mrope_positions.clone()
        ids = torch.as_tensor(input_ids).to(rows.device)
        media = ((ids == self.config.image_token_id) | (ids == self.config.video_token_id)).nonzero().flatten()
        begins = torch.ones_like(media, dtype=torch.bool)
        begins[1:] = media[1:] != media[:-1] + 1
        first = media[begins][begins.cumsum(0) - 1]  # where the image or video of each token begins
        base = torch.where(first > 0, rows[0, (first - 1).clamp(min=0)] + 1, 0)
        ahead = int((media < num_computed_tokens).sum())
        for piece in multimodal_embeddings:
            mine = slice(ahead, ahead + len(piece))
            rows[:, media[mine]] = base[mine] + piece[:, -4:-1].T.long().to(rows.device)
            ahead += len(piece)
        behind = rows[0, -1] + 1 if len(media) == 0 or int(media[-1]) < len(ids) - 1 else rows.max() + 1
        return [piece[:, :-4] for piece in multimodal_embeddings], rows, int(behind) - len(ids)

    def _reach(self, feature: Any) -> int:
        """Return how many positions an image or video takes up."""
        kind = "video" if feature.modality == "video" else "image"
        thw = feature.data[f"{kind}_grid_thw"].data.flatten().tolist()
        if kind == "image":
            merge: int = self.config.vision_config.spatial_merge_size
            return max(int(side) for side in thw[1:]) // merge
        seconds = feature.data.get("second_per_grid_ts")
        rate = None if seconds is None else float(seconds.data)
        key = (*thw, rate)
        if key not in self._reaches:
            adapter = self._shape(torch.device("cpu")).adapter
            ids = torch.full((1, self._grid(thw).num_tokens), adapter.video_token_id)
            inputs = _placed_by(thw, rate) | {"mm_token_type_ids": torch.zeros_like(ids)}
            rows = adapter.positions(ids, torch.ones_like(ids), inputs)[adapter.position_rows, 0]
            self._reaches[key] = int(_from_zero(rows).max()) + 1
        return self._reaches[key]

    def _shape(self, device: torch.device) -> Shadow:
        if self._shadow is None:
            self._shadow = Shadow(
                self.config, "Qwen2_5_VLForConditionalGeneration", self.language_model.embed_input_ids, device
            )
        return self._shadow

    def _grid(self, thw: Sequence[int]) -> TokenGrid:
        merge = self.config.vision_config.spatial_merge_size
        return TokenGrid(int(thw[0]), int(thw[1]) // merge, int(thw[2]) // merge)


def _placed_by(thw: Sequence[int], rate: float | None) -> dict[str, Tensor]:
    """Return what the adapter places a video's tokens by."""
    placed = {"video_grid_thw": torch.tensor([[int(side) for side in thw]])}
    return placed if rate is None else placed | {"second_per_grid_ts": torch.tensor([rate])}


def _from_zero(positions: Tensor) -> Tensor:
    """Return positions (3, N) counted from where the video begins: its height does there, its time may run ahead."""
    return positions - positions[1].min()
