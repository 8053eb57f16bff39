"""AutoGaze: a small network that looks at pixels, and says which patches of several scales are worth encoding.

It acts before the vision encoder, on an encoder that takes patches of several scales. Such an encoder is not in
transformers; on a stock model `AutoGaze` keeps the tokens of the cells that were gazed at:

>>> from vidsieve.compressors.autogaze import AutoGaze, AutoGazePolicy
>>> gaze = AutoGazePolicy.from_pretrained("AutoGaze").gaze(pixels)
>>> with vidsieve.attach(model, AutoGaze(retention=0.25, masks=gaze.masks)):
...     model.generate(**inputs)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors._gazing import GazeNetwork, GazeShape, Llama3Rope
from vidsieve.compressors.base import ScoreCompressor
from vidsieve.errors import BudgetError, PolicyError, UnknownNameError, VideoError
from vidsieve.io.bounded import read_json
from vidsieve.policies import CONFIG, Size, fill, parameters_without_nan, read_weights
from vidsieve.types import TokenGrid, VideoTokens

VARIANTS = ("official", "ours")


@dataclass(frozen=True)
class Gaze:
    """Patches of a video that were gazed at.

    Parameters
    ----------
    masks : tuple of Tensor, (T, n_s), bool
        For each scale, small to large, the patches in raster order.
    patches : Tensor, (n,), int64
        Frame times the patches of a frame, plus the patch: frame by frame in order of gaze, or in raster order where
        frames were cut into tiles.
    padding : Tensor, (n,), bool
        True where a frame had ended; the patch there means nothing.
    counts : Tensor, (T,), int64
        Patches of each frame, padding included.
    """

    masks: tuple[Tensor, ...]
    patches: Tensor
    padding: Tensor
    counts: Tensor


class AutoGazePolicy(nn.Module):
    """A trained gazing network.

    Parameters
    ----------
    shape : GazeShape
    variant : str
        ``"official"``: patches that are fed back while a frame is gazed at all have the places of the frame's last
        features, as in the release under the versions of transformers that it names. ``"ours"``: they are numbered as
        in training.

    Raises
    ------
    UnknownNameError
        If there is no such variant.

    References
    ----------
    AutoGaze, CVPR 2026 (arXiv 2603.12254); NVlabs/AutoGaze @ 2943b28, autogaze/models/autogaze.
    """

    def __init__(self, shape: GazeShape, variant: str = "official") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise UnknownNameError("variant of autogaze", variant, VARIANTS)
        self.shape, self.variant = shape, variant
        self.gazing_model = GazeNetwork(shape)

    @classmethod
    def from_pretrained(cls, folder: str | Path, variant: str = "official") -> Self:
        """Return the policy of a release's folder, `config.json` and `model.safetensors`, in evaluation mode, float32.

        Raises
        ------
        PolicyError
            If a file is missing, damaged or describes another network.
        """
        folder = Path(folder)
        raw = read_json(folder / CONFIG, PolicyError, "fetch the release's folder again", dict)
        try:
            shape = msgspec.convert(raw, _AutoGazeConfig).shape()
        except msgspec.ValidationError as error:
            raise PolicyError(f"{folder / CONFIG} is not of an AutoGaze network: {error!s:.300}") from None
        with torch.device("meta"):  # without memory: the configuration may ask for anything
            policy = cls(shape, variant)
        fill(policy, read_weights(folder), f"the weights in {folder} do not fit their config.json")
        if not parameters_without_nan(policy):
            raise PolicyError(f"the weights in {folder} are not all finite numbers: fetch them again")
        return policy.eval()

    @torch.no_grad()
    def gaze(
        self,
        video: Tensor,
        ratio: float = 0.75,
        requirement: float | None = 0.7,
        *,
        scales: Sequence[int] | None = None,
        patch: int = 16,
        clip: int = 16,
    ) -> Gaze:
        """Return the patches of a video that are worth encoding.

        Parameters
        ----------
        video : Tensor, (T, 3, H, W), floating
            Normalised as the release's preprocessor does; resized to the network's side.
        ratio : float
            Most that is gazed at of a frame's patches, 0 < ratio ≤ 1; at least one patch.
        requirement : float, optional
            Predicted loss at which a frame ends; None: frames end at `ratio`.
        scales : sequence of int, optional
            Scales of an encoder of larger frames, in pixels, ascending, as many as the network's. Square frames of the
            last of them are cut into tiles of the network's number of patches, each gazed at for itself.
        patch : int
            Side of that encoder's patches.
        clip : int
            Frames that are gazed at in one go; the release was trained on 16.

        Raises
        ------
        BudgetError
            If `ratio` or `clip` is out of bounds.
        VideoError
            If the video is no such tensor, or does not fit `scales`.
        """
        if not 0 < ratio <= 1:
            raise BudgetError(f"ratio must be in (0, 1], got {ratio!r}")
        if clip < 1:
            raise BudgetError(f"a clip needs a frame at least, got {clip!r}")
        if video.ndim != 4 or video.shape[1] != 3 or not len(video) or not video.is_floating_point():
            raise VideoError(f"a video must be (T, 3, H, W) floating, got {tuple(video.shape)} {video.dtype}")
        video, shape = video.to(self.gazing_model.connector.pos_embed), self.shape
        sides = shape.sides if scales is None else _sides(scales, patch, video, shape)
        whole = scales is None or (tuple(scales) == shape.scales and sides == shape.sides)
        # As the release multiplies: in single precision.
        limit = max(1, int(torch.tensor(ratio, dtype=torch.float32) * shape.tokens))
        gazed = []
        for frames in torch.split(video, clip):
            batch = frames[None] if whole else tiles(frames, shape.sides[-1] * patch)
            gazed += self.gazing_model.generate(batch, limit, requirement, running=self.variant == "ours")
        masks = masks_of(gazed, shape)
        if not whole:
            masks = tuple(stitched(*pieces) for pieces in zip(masks, shape.sides, sides, strict=True))
            every = torch.cat(masks, 1)
            patches = every.flatten().nonzero().flatten()
            return Gaze(masks, patches, torch.zeros_like(patches, dtype=torch.bool), every.sum(1))
        chosen = [tokens[0] for tokens in gazed]
        return Gaze(
            tuple(mask[0] for mask in masks),
            torch.cat([tokens + t * shape.tokens for t, tokens in enumerate(chosen)]),
            torch.cat(chosen) == shape.tokens,
            torch.tensor([len(tokens) for tokens in chosen], device=video.device),
        )


@dataclass(frozen=True)
class AutoGaze(ScoreCompressor):
    """Keep the tokens of a stock model whose cells hold the most gazed patches.

    It is made for one video, and not among the registered methods: adapters hand over no pixels. The encoder still
    looks at every patch, so that only the LLM has less to do.

    Parameters
    ----------
    masks : tuple of Tensor
        `Gaze.masks` of the video.

    References
    ----------
    As of `AutoGazePolicy`.
    """

    name: ClassVar[str] = "autogaze"
    paper: ClassVar[str] = "AutoGaze, CVPR 2026"
    trained: ClassVar[bool] = True
    masks: tuple[Tensor, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def score(self, video: VideoTokens) -> Tensor:
        """Return the number of gazed patches (N,) float32 in the cell of each token.

        Raises
        ------
        PolicyError
            If there are no masks.
        """
        if not self.masks:
            raise PolicyError("autogaze needs what was gazed at: AutoGaze(masks=policy.gaze(pixels).masks)")
        return tokens_of_masks(self.masks, video.grid).to(video.embeds.device)


# -- masks --------------------------------------------------------------------------------------------------


def masks_of(gazed: Sequence[Tensor], shape: GazeShape) -> tuple[Tensor, ...]:
    """Return for each scale the mask (B, T, n_s) bool of T frames' patches (B, n_t) int64, among them the end token."""
    every = torch.stack(
        [torch.zeros(len(t), shape.tokens + 1, dtype=torch.bool, device=t.device).scatter(1, t, True) for t in gazed], 1
    )
    return torch.split(every[..., :-1], [side * side for side in shape.sides], -1)


def tiles(frames: Tensor, side: int) -> Tensor:
    """Return the tiles (n², T, 3, side, side) of square frames (T, 3, H, H), with zeros below and to the right."""
    rows = -(-frames.shape[-1] // side)
    over = rows * side - frames.shape[-1]
    cut = F.pad(frames, (0, over, 0, over)).reshape(*frames.shape[:2], rows, side, rows, side)
    return cut.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)


def stitched(mask: Tensor, side: int, whole: int) -> Tensor:
    """Return the mask (T, whole²) of frames from those of their n² tiles (n², T, side²); the padding is cut off."""
    rows = round(len(mask) ** 0.5)
    laid = mask.reshape(rows, rows, mask.shape[1], side, side).permute(2, 0, 3, 1, 4)
    return laid.reshape(mask.shape[1], rows * side, rows * side)[:, :whole, :whole].flatten(1)


def tokens_of_masks(masks: Sequence[Tensor], grid: TokenGrid) -> Tensor:
    """Return the number of gazed patches in the cell of each token (N,) float32; they add up to all gazed patches.

    A patch counts in each cell by the part of it that lies there, in space and in time: patches of small scales, which
    cover many cells, count little in each. `top_indices` of these numbers are tokens to keep.

    Parameters
    ----------
    masks : sequence of Tensor, (T, n_s), bool
        Of square scales.
    grid : TokenGrid
    """
    per_cell = torch.zeros(grid.frames, grid.height, grid.width)
    for mask in masks:
        side = round(mask.shape[1] ** 0.5)
        time, down, across = (
            _parts(*pair) for pair in ((grid.frames, len(mask)), (grid.height, side), (grid.width, side))
        )
        gazed = mask.cpu().float().reshape(-1, side, side)
        per_cell += torch.einsum("ts,hi,wj,sij->thw", time, down, across, gazed)
    cells = per_cell.flatten()
    return cells if grid.places is None else cells[torch.tensor(grid.places)]


def _parts(cells: int, pieces: int) -> Tensor:
    """Return the part (cells, pieces) of each of a line's equal pieces that lies in each of its equal cells."""
    edges, ends = torch.arange(cells + 1) / cells * pieces, torch.arange(pieces + 1)
    low = torch.maximum(edges[:-1, None], ends[None, :-1])
    high = torch.minimum(edges[1:, None], ends[None, 1:])
    return (high - low).clamp(min=0)


def _sides(scales: Sequence[int], patch: int, video: Tensor, shape: GazeShape) -> tuple[int, ...]:
    if len(scales) != len(shape.scales) or patch < 1 or list(scales) != sorted(scales) or scales[0] < patch:
        raise VideoError(f"scales {tuple(scales)} of patches of {patch} pixels are not like {shape.scales}, ascending")
    if video.shape[-2:] != (scales[-1], scales[-1]):
        raise VideoError(f"frames must be {scales[-1]}×{scales[-1]}, the last of the scales, got {tuple(video.shape)}")
    return tuple(scale // patch for scale in scales)


# -- the release's configuration ----------------------------------------------------------------------------


class _DecoderConfig(msgspec.Struct):
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    num_multi_token_pred: Size = 1


class _VisionConfig(msgspec.Struct):
    hidden_dim: int = 192
    out_dim: int = 192
    depth: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 1
    kernel_size: Size = 16
    temporal_patch_size: Literal[1] = 1
    trunk_temporal_kernel_size: Literal[3] = 3
    trunk_spatial_kernel_size: Literal[3] = 3


class _GazingConfig(msgspec.Struct):
    gaze_decoder_config: _DecoderConfig
    vision_model_config: _VisionConfig = msgspec.field(default_factory=_VisionConfig)
    input_img_size: Size = 224


class _AutoGazeConfig(msgspec.Struct):
    gaze_model_config: _GazingConfig
    scales: str | int = "224"
    num_vision_tokens_each_frame: Size = 196

    def shape(self) -> GazeShape:
        """Return the network's sizes; PolicyError where widths or numbers do not fit each other."""
        decoder, vision = self.gaze_model_config.gaze_decoder_config, self.gaze_model_config.vision_model_config
        width, heads = decoder.hidden_size, decoder.num_attention_heads
        if not vision.hidden_dim == vision.out_dim == width:
            raise PolicyError(f"features {vision.hidden_dim} and {vision.out_dim} wide do not fit a decoder of {width}")
        try:
            scales = tuple(sorted(int(scale) for scale in str(self.scales).split("+")))
        except ValueError:
            raise PolicyError(f"scales must be numbers with '+' between them, got {self.scales!r:.80}") from None
        block = BlockShape(
            width,
            heads,
            decoder.num_key_value_heads or heads,
            decoder.head_dim or width // heads,
            decoder.intermediate_size,
            decoder.rms_norm_eps,
            decoder.rope_theta,
            qkv_bias=False,
        )
        return GazeShape(
            scales,
            self.num_vision_tokens_each_frame,
            self.gaze_model_config.input_img_size,
            vision.kernel_size,
            block,
            decoder.num_hidden_layers,
            decoder.num_multi_token_pred,
            vision.depth,
            self._rope(),
        )

    def _rope(self) -> Llama3Rope | None:
        raw = self.gaze_model_config.gaze_decoder_config.rope_scaling or {}
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise PolicyError(f"rotary positions of type {kind!r:.80} are not read, 'default' and 'llama3' are")
        return msgspec.convert(raw, Llama3Rope) if kind == "llama3" else None
