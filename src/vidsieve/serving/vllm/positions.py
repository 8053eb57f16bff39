"""Positions in time and space under vLLM, for models whose embeddings of a pruned video carry them (M-RoPE).

Kept tokens stay where they were in time and space, and the text after a video goes on after its largest position, as
vLLM has it without pruning (``positions="legacy"`` under transformers).

vLLM finds out positions behind a pruned video when its embeddings are gathered. Where these are not, as the video is in
the prefix cache, or only a part of the prompt is computed, that goes wrong (0.32). How far a video reaches depends on
its grid alone: text gets its positions at once, and kept tokens theirs when they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.serving.vllm.shared import CARRIED, Selector, Shadow, carried, settings_in
from vidsieve.types import TokenGrid

RATE = 0.4999
"""Set as vLLM's own pruning rate, so that its runner reads positions from the embeddings; nothing is pruned by it."""
COLUMNS = 9
"""Columns of positions behind an embedding: three digits of time, height and width."""


@dataclass(frozen=True)
class Stands:
    """What stands for a video in an unpruned prompt.

    Parameters
    ----------
    grid : TokenGrid
    ids : Tensor, (M,), int64
        Placeholders of the grid's tokens in raster order, and whatever text is between them.
    placed_by : mapping
        What the adapter places the tokens by, as ``video_grid_thw``.
    """

    grid: TokenGrid
    ids: Tensor
    placed_by: Mapping[str, Tensor]


class CarriesPositions:
    """Mixed in before a model of vLLM's; a video's embeddings are cut to what stays before they are cached."""

    transformers_class: ClassVar[str]
    config: Any
    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = settings_in(vllm_config, RATE)
        if settings is not None:
            vllm_config.model_config.multimodal_config.video_pruning_rate = RATE
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._selector: Selector | None = None
        if settings is not None:
            shadow = Shadow(self.config, self.transformers_class, self.language_model.embed_input_ids)
            self._selector = Selector(settings, shadow)
        self._reaches: dict[tuple[Any, ...], int] = {}
        self._asked: dict[str, Any] = {}

    def stands_for(self, thw: Sequence[int], seconds: float | None, timestamps: Any) -> Stands:
        """Return what stands for a video with patches `thw`, seconds a grid step, and times (T,) in seconds."""
        raise NotImplementedError

    # -- embeddings -------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the embeddings of every image and video, the latter pruned, with columns of positions."""
        self._asked = {name: kwargs.pop(name, None) for name in CARRIED}
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: Sequence[Tensor], video_input: Any
    ) -> tuple[Tensor, ...]:
        if self._selector is None:
            return tuple(super()._postprocess_video_embeds_evs(video_embeds_split, video_input))  # type: ignore[misc]
        seconds, timestamps = (video_input.get(name) for name in ("second_per_grid_ts", "timestamps"))
        found = []
        for place, (video, thw) in enumerate(zip(video_embeds_split, video_input["video_grid_thw"], strict=True)):
            rate = None if seconds is None else float(seconds[place])
            times = None if timestamps is None else timestamps[place]
            stands = self.stands_for(_sides(thw), rate, times)
            found.append(self._cut(self._selector, video, place, stands))
        return tuple(found)

    def _cut(self, selector: Selector, video: Tensor, place: int, stands: Stands) -> Tensor:
        """Return what is left of video `place` of a batch: embeddings of kept tokens and of all text, positions."""
        count, prompt, key = carried(self._asked, place)
        ids = stands.ids.to(video.device)
        in_grid = ids == self.config.video_token_id
        width = selector.adapter.hidden_size
        indices, kept, positions = selector(
            video[:, :width], stands.grid, count, prompt, ids, inputs=stands.placed_by, report_key=key
        )
        stays = ~in_grid
        stays[in_grid.nonzero().flatten()[indices]] = True
        embeds = video.new_zeros(int(stays.sum()), video.shape[1])
        at = in_grid[stays]
        embeds[at] = torch.cat([kept, video[indices, width:]], 1)  # what a merged token adds inside is its anchor's
        if len(at) > count:
            embeds[~at, :width] = self.language_model.embed_input_ids(ids[~in_grid]).to(embeds)
        return torch.cat([embeds, written(from_zero(positions)[:, stays.to(positions.device)], video)], 1)

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: Sequence[Tensor], image_input: Any
    ) -> tuple[Tensor, ...]:
        if self._selector is None:
            return tuple(super()._postprocess_image_embeds_evs(image_embeds_split, image_input))  # type: ignore[misc]
        grids = (self.grid(_sides(thw)) for thw in image_input["image_grid_thw"])
        places = (torch.cartesian_prod(torch.tensor([0]), torch.arange(g.height), torch.arange(g.width)) for g in grids)
        return tuple(
            torch.cat([image, written(place.T, image)], 1)
            for image, place in zip(image_embeds_split, places, strict=True)
        )

    # -- positions --------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return positions (3, L) of a prompt, right for its text, and how far they run ahead of its length."""
        if self._selector is None:
            return tuple(super().get_mrope_input_positions(input_tokens, mm_features))  # type: ignore[misc]
        length, cursor, place = len(input_tokens), 0, 0
        rows = torch.zeros(3, length, dtype=torch.int64)
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            start, span = feature.mm_position.offset, feature.mm_position.length
            rows[:, place:start] = torch.arange(cursor, cursor + start - place)
            cursor += start - place
            rows[:, start : start + span] = cursor
            cursor += self._reach(self._selector.adapter, feature)
            place = start + span
        rows[:, place:] = torch.arange(cursor, cursor + length - place)
        return rows, cursor - place

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Return embeddings without their columns, and positions with those of the tokens that they stand for."""
        if self._selector is None:
            found = super().recompute_mrope_positions(  # type: ignore[misc]
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
        embeds = []
        for piece in multimodal_embeddings:
            mine = slice(ahead, ahead + len(piece))
            rows[:, media[mine]] = base[mine] + read(piece[:, -COLUMNS:]).to(rows.device)
            embeds.append(piece[:, :-COLUMNS])
            ahead += len(piece)
        return embeds, rows, int(rows.max()) + 1 - len(ids)

    def _reach(self, adapter: Adapter, feature: Any) -> int:
        """Return how many positions an image or video takes up."""
        data = feature.data
        if feature.modality != "video":
            merge: int = self.config.vision_config.spatial_merge_size
            return max(_sides(data["image_grid_thw"].data)[1:]) // merge
        thw = _sides(data["video_grid_thw"].data)
        seconds, times = (data[name].data if name in data else None for name in ("second_per_grid_ts", "timestamps"))
        rate = None if seconds is None else float(seconds)
        stands = self.stands_for(thw, rate, times)
        key = (*thw, rate, len(stands.ids))
        if key not in self._reaches:
            ids = stands.ids[None]
            inputs = dict(stands.placed_by) | {"mm_token_type_ids": torch.zeros_like(ids)}
            rows = adapter.positions(ids, torch.ones_like(ids), inputs)[adapter.position_rows, 0]
            self._reaches[key] = int(from_zero(rows).max()) + 1
        return self._reaches[key]

    def grid(self, thw: Sequence[int]) -> TokenGrid:
        """Return the grid of tokens over patches `thw`."""
        merge = self.config.vision_config.spatial_merge_size
        return TokenGrid(thw[0], thw[1] // merge, thw[2] // merge)


def from_zero(positions: Tensor) -> Tensor:
    """Return positions (3, M) counted from where the video begins: its height does there, its time may run ahead."""
    return positions - positions[1].min()


def written(positions: Tensor, like: Tensor) -> Tensor:
    """Return positions (3, M) as columns (M, 9) in the dtype of embeddings; bfloat16 counts to 256 and no further."""
    digits = [positions // 256**place % 256 for place in range(COLUMNS // 3)]
    return torch.cat(digits).T.to(like)


def read(columns: Tensor) -> Tensor:
    """Return positions (3, M) int64 from columns (M, 9)."""
    digits = columns.T.long().reshape(-1, 3, len(columns))
    return sum((digit * 256**place for place, digit in enumerate(digits)), torch.zeros_like(digits[0]))


def _sides(thw: Any) -> list[int]:
    return [int(side) for side in torch.as_tensor(thw).flatten().tolist()]
