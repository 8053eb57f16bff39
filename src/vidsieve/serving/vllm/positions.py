"""M-RoPE positions under vLLM, for models whose embeddings of a pruned video carry them.

Kept tokens keep their positions in time and space, and the text after a video continues after its largest position, as
in vLLM without pruning (``positions="legacy"`` under transformers).

vLLM 0.32 computes positions after a pruned video while it gathers the video's embeddings; on a prefix-cache hit or in
chunked prefill they are wrong. The extent of a video depends on its grid alone, so here text gets its positions at
once, and kept tokens get theirs when their embeddings are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.serving.vllm.shared import CARRIED, Selector, check_engine, settings_of
from vidsieve.types import TokenGrid

RATE = 0.4999
"""Set as vLLM's own pruning rate, so that its runner reads positions from the embeddings; nothing is pruned by it."""
COLUMNS = 9
"""Columns of positions after an embedding: three digits of time, height and width."""


@dataclass(frozen=True)
class UnprunedVideo:
    """A video in an unpruned prompt.

    Parameters
    ----------
    grid : TokenGrid
    ids : Tensor, (M,), int64
        Placeholders of the grid's tokens in raster order, and the text between them.
    inputs : mapping
        Inputs from which the adapter computes positions, as ``video_grid_thw``.
    """

    grid: TokenGrid
    ids: Tensor
    inputs: Mapping[str, Tensor]


class CarriesPositions:
    """Mixed in before a vLLM model; a video's embeddings are cut to the kept tokens before they are cached."""

    transformers_class: ClassVar[str]
    config: Any
    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = settings_of(vllm_config.model_config.hf_config)
        if settings is not None:
            check_engine(vllm_config, RATE)
            vllm_config.model_config.multimodal_config.video_pruning_rate = RATE
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._selector = Selector.of(settings, self, self.transformers_class, vllm_config.model_config)
        self._extents: dict[tuple[Any, ...], int] = {}
        self._carried: dict[str, Any] = {}

    def unpruned(self, thw: Sequence[int], seconds: float | None, timestamps: Any) -> UnprunedVideo:
        """Return a video with patches `thw`, seconds per grid step, and times (T,) in seconds, as in a prompt."""
        raise NotImplementedError

    # -- embeddings -------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the embeddings of every image and video, the latter pruned, with columns of positions."""
        self._carried = {name: kwargs.pop(name, None) for name in CARRIED}
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: Sequence[Tensor], video_input: Any
    ) -> tuple[Tensor, ...]:
        if self._selector is None:
            return tuple(super()._postprocess_video_embeds_evs(video_embeds_split, video_input))  # type: ignore[misc]
        seconds, timestamps = (video_input.get(name) for name in ("second_per_grid_ts", "timestamps"))
        pieces = []
        for place, (video, thw) in enumerate(zip(video_embeds_split, video_input["video_grid_thw"], strict=True)):
            rate = None if seconds is None else float(seconds[place])
            times = None if timestamps is None else timestamps[place]
            pieces.append(self._pruned(self._selector, video, place, self.unpruned(_sides(thw), rate, times)))
        return tuple(pieces)

    def _pruned(self, selector: Selector, video: Tensor, place: int, unpruned: UnprunedVideo) -> Tensor:
        """Return the embeddings of video `place`: its kept tokens and all of its text, with their positions."""
        ids = unpruned.ids.to(video.device)
        in_grid = ids == self.config.video_token_id
        width = selector.adapter.hidden_size
        indices, kept, positions = selector(
            video[:, :width], unpruned.grid, self._carried, place, ids, inputs=unpruned.inputs
        )
        stays = ~in_grid
        stays[in_grid.nonzero().flatten()[indices]] = True
        embeds = video.new_zeros(int(stays.sum()), video.shape[1])
        at = in_grid[stays]
        embeds[at] = torch.cat([kept, video[indices, width:]], 1)  # deepstack features of a merged token: its anchor's
        if len(at) > len(indices):
            embeds[~at, :width] = self.language_model.embed_input_ids(ids[~in_grid]).to(embeds)
        return torch.cat([embeds, written(from_zero(positions)[:, stays.to(positions.device)], video)], 1)

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: Sequence[Tensor], image_input: Any
    ) -> tuple[Tensor, ...]:
        if self._selector is None:
            return tuple(super()._postprocess_image_embeds_evs(image_embeds_split, image_input))  # type: ignore[misc]
        pieces = []
        for image, thw in zip(image_embeds_split, image_input["image_grid_thw"], strict=True):
            grid = self.grid(_sides(thw))
            places = torch.cartesian_prod(torch.tensor([0]), torch.arange(grid.height), torch.arange(grid.width))
            pieces.append(torch.cat([image, written(places.T, image)], 1))
        return tuple(pieces)

    # -- positions --------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return positions (3, L) of a prompt, correct for its text, and the largest one + 1 − L."""
        if self._selector is None:
            return tuple(super().get_mrope_input_positions(input_tokens, mm_features))  # type: ignore[misc]
        length, cursor, place = len(input_tokens), 0, 0
        rows = torch.zeros(3, length, dtype=torch.int64)
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            start, span = feature.mm_position.offset, feature.mm_position.length
            rows[:, place:start] = torch.arange(cursor, cursor + start - place)
            cursor += start - place
            rows[:, start : start + span] = cursor
            cursor += self._extent(self._selector.adapter, feature)
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
        """Return embeddings without their columns, positions updated from these, and the largest one + 1 − L."""
        if self._selector is None:
            return tuple(
                super().recompute_mrope_positions(  # type: ignore[misc]
                    input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
                )
            )
        if not multimodal_embeddings:  # vLLM's first runner asks about every running request at every step
            return [], mrope_positions, int(mrope_positions.max()) + 1 - len(input_ids)
        rows = mrope_positions.clone()
        ids = torch.as_tensor(input_ids).to(rows.device)
        media = ((ids == self.config.image_token_id) | (ids == self.config.video_token_id)).nonzero().flatten()
        begins = torch.ones_like(media, dtype=torch.bool)
        begins[1:] = media[1:] != media[:-1] + 1
        first = media[begins][begins.cumsum(0) - 1]  # of each token's image or video
        base = torch.where(first > 0, rows[0, (first - 1).clamp(min=0)] + 1, 0)
        ahead = int((media < num_computed_tokens).sum())
        embeds = []
        for piece in multimodal_embeddings:
            mine = slice(ahead, ahead + len(piece))
            rows[:, media[mine]] = base[mine] + read(piece[:, -COLUMNS:]).to(rows.device)
            embeds.append(piece[:, :-COLUMNS])
            ahead += len(piece)
        return embeds, rows, int(rows.max()) + 1 - len(ids)

    def _extent(self, adapter: Adapter, feature: Any) -> int:
        """Return the number of positions that an image or video takes up."""
        data = feature.data
        if feature.modality != "video":
            grid = self.grid(_sides(data["image_grid_thw"].data))
            return max(grid.height, grid.width)
        thw = _sides(data["video_grid_thw"].data)
        seconds, times = (data[name].data if name in data else None for name in ("second_per_grid_ts", "timestamps"))
        rate = None if seconds is None else float(seconds)
        unpruned = self.unpruned(thw, rate, times)
        key = (*thw, rate, len(unpruned.ids))
        if key not in self._extents:
            ids = unpruned.ids[None]
            inputs = dict(unpruned.inputs) | {"mm_token_type_ids": torch.zeros_like(ids)}
            rows = adapter.positions(ids, torch.ones_like(ids), inputs)[adapter.position_rows, 0]
            self._extents[key] = int(from_zero(rows).max()) + 1
        return self._extents[key]

    def grid(self, thw: Sequence[int]) -> TokenGrid:
        """Return the grid of tokens over patches `thw`."""
        merge = self.config.vision_config.spatial_merge_size
        return TokenGrid(thw[0], thw[1] // merge, thw[2] // merge)


def from_zero(positions: Tensor) -> Tensor:
    """Return positions (3, M) counted from the start of the video, which is its least height; its time may be ahead."""
    return positions - positions[1].min()


def written(positions: Tensor, like: Tensor) -> Tensor:
    """Return positions (3, M) as columns (M, 9) in the embeddings' dtype; bfloat16 is exact up to 256."""
    digits = [positions // 256**place % 256 for place in range(COLUMNS // 3)]
    return torch.cat(digits).T.to(like)


def read(columns: Tensor) -> Tensor:
    """Return positions (3, M) int64 from columns (M, 9)."""
    digits = columns.T.long().reshape(-1, 3, len(columns))
    return sum((digit * 256**place for place, digit in enumerate(digits)), torch.zeros_like(digits[0]))


def _sides(thw: Any) -> list[int]:
    return [int(side) for side in torch.as_tensor(thw).flatten().tolist()]
