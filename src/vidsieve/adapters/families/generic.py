"""A model of a class that no family is registered for: tried by its signatures, and proven on the caller's prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.encoded import Encoded, VideoFeatures
from vidsieve.adapters.families.counted import CountedPositions
from vidsieve.adapters.families.mrope import MropeAdapter, deep_features
from vidsieve.adapters.family import Family, Videos
from vidsieve.adapters.template import Template
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.front import Front
from vidsieve.errors import NeedError, PromptError, StageError, UnsupportedCallError, UnsupportedModelError
from vidsieve.types import Need, Selection, Stage, TokenGrid

_TEXT = {"input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "kwargs"}
"""Arguments of `get_rope_index` that have nothing to do with videos."""
_OWN = {"attention_mask", "labels", "logits_to_keep", "return_dict", "use_cache", "cache", "past_key_values"}
"""Arguments of a call that the comparison sets itself, or leaves out."""


class GenericAdapter(MropeAdapter):
    """Adapter of an unknown class with `get_rope_index`.

    Definition 2, since nothing tells what else than attention its layers do. The first `encode` compares the model on
    the whole prompt with itself through this adapter, all tokens kept, and looks at the positions of decoded tokens.
    Frames are the runs of placeholders if a video has several of equal length, or as many as its grid or pixels say.
    Images and sounds beside a video are refused, and so are methods inside the LLM.
    """

    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION})
    image_keys: ClassVar[tuple[str, ...]] = ()
    fronts: ClassVar[frozenset[Stage]] = frozenset()
    lacks: ClassVar[Mapping[Need | Stage, str]] = dict.fromkeys(
        [Stage.FRAME, Stage.ENCODER], "nothing tells how the encoder of an unknown class takes frames"
    )

    def __init__(self, model: Any, template: Template | NeedError | None = None, convention: str = "installed") -> None:
        if convention == "legacy":
            raise UnsupportedCallError(f"legacy positions of {self.family} are not known: use positions='installed'")
        super().__init__(model, template, convention)
        self._proven, self._listed = False, True

    @property
    def video_token_id(self) -> int:
        """The id of a video placeholder, as the configuration states it."""
        return _video_token(self.model.config)

    @property
    def image_token_id(self) -> int:
        """The id of an image placeholder; −1, which no token has, where the configuration states none."""
        return int(getattr(self.model.config, "image_token_id", -1))

    def limit_frames(self, processor: Any, tokens: int) -> None:
        """Refuse: processors of unknown families are not known either."""
        raise UnsupportedCallError(f"limit the frames of {self.family} in its video processor: ours is the generic one")

    def image_features(self, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Refuse."""
        return Family.image_features(self, inputs)

    def check(self, compressor: Compressor) -> None:
        """Refuse a method that this model cannot serve, and every one that acts inside the LLM."""
        if isinstance(compressor, Compressor) and compressor.acts is not Stage.PRE_LLM:
            raise StageError(
                f"{compressor.name} acts {compressor.acts.value}: {type(self.model).__name__} is served by the generic "
                "adapter, for methods that act before the LLM alone"
            )
        super().check(compressor)

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return every video that `get_video_features` makes of the arguments that it names, or of ready features."""
        ready = encoder_features(inputs, "video")
        if ready is None:
            encode = self.model.model.get_video_features
            given = {name: inputs[name] for name in signature(encode).parameters if inputs.get(name) is not None}
            given["pixel_values_videos"] = given["pixel_values_videos"].to(self.device, self.model.dtype)
            ready = encode(**given, return_dict=True)
        output = ready.pooler_output
        self._listed = not isinstance(output, Tensor)
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in output])
        shapes = _shapes(inputs)
        # Encoders make the same number of tokens of every patch.
        sizes = [len(rows) * math.prod(shape) // sum(map(math.prod, shapes)) for shape in shapes]
        if sum(sizes) != len(rows):
            raise PromptError(f"{len(rows)} features are not shared out evenly among videos of {shapes} patches")
        grids = map(_grid, shapes, sizes, self._runs(inputs.get("input_ids"), sizes))
        deep = [torch.split(layer, sizes) for layer in deep_features(ready)]
        return [
            VideoFeatures(part, grid, part[:0], tuple(layer[number] for layer in deep))
            for number, (part, grid) in enumerate(zip(torch.split(rows, sizes), grids, strict=True))
        ]

    def _runs(self, ids: Tensor | None, sizes: Sequence[int]) -> list[int]:
        """Return for each video its number of equally long runs of placeholders, 1 where they are not."""
        if ids is None:
            return [1] * len(sizes)
        video = ids == self.video_token_id
        if int(video.sum()) != sum(sizes):
            return [1] * len(sizes)  # an error that `find_videos` reports
        starts = video & ~torch.nn.functional.pad(video, (1, 0))[:, :-1]
        numbers = starts.flatten().cumsum(0)[video.flatten()]
        runs = []
        for part in torch.tensor_split(numbers, torch.tensor(sizes).cumsum(0)[:-1]):
            lengths = torch.unique_consecutive(part, return_counts=True)[1]
            runs.append(len(lengths) if len(lengths.unique()) == 1 else 1)
        return runs

    def encoder_outputs(
        self, rows: Sequence[Tensor], deep: Sequence[Sequence[Tensor]], modality: str
    ) -> BaseModelOutputWithPooling:
        """Return the features in a list, or as one tensor (N_kept, 1, D), whichever the model's own encoder returns."""
        if self._listed:
            return super().encoder_outputs(rows, deep, modality)
        return BaseModelOutputWithPooling(pooler_output=torch.cat(list(rows))[:, None])

    # -- the proof --------------------------------------------------------------------------------------------

    def encode(
        self,
        inputs: Mapping[str, Any],
        videos: Videos = None,
        needs: frozenset[Need] = frozenset(),
        front: Front | None = None,
    ) -> Encoded:
        """Return a batch with its videos encoded and located; the first one is compared with the model alone.

        Raises
        ------
        UnsupportedModelError
            If the model answers otherwise through this adapter, all tokens kept.
        """
        given = (name for name, value in inputs.items() if value is not None and value is not False)
        sounds = [name for name in given if "audio" in name or "input_features" in name]
        if sounds:
            raise UnsupportedCallError(f"sounds in a call ({', '.join(sounds)}) are not supported for {self.family}")
        if not self._proven and self.carries_video(inputs) and inputs.get("input_ids") is not None:
            self._prove(inputs)
            self._proven = True
        return super().encode(inputs, videos, needs, front)

    def _prove(self, inputs: Mapping[str, Any]) -> None:
        """Compare the logits of the last token of every prompt."""
        takes = signature(type(self.model).forward).parameters.keys()
        mask = inputs.get("attention_mask")
        short = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        stock = {name: inputs[name] for name in takes - _OWN if inputs.get(name) is not None}
        stock |= {"attention_mask": mask, "use_cache": True}
        with torch.no_grad(), _evaluating(self.model):
            theirs, seen = self._run(stock | (short if mask is None or bool(mask[:, -1].all()) else {}))
            try:
                encoded = super().encode(stock)
                plan = self.build(encoded, encoded.per_row(encoded.everything()))
                ours, given = self._run(plan.inputs | short)
                self._prove_decoding(encoded)
            except (UnsupportedCallError, UnsupportedModelError):
                raise
            except Exception as error:  # whatever a model raises where it does not fit
                raise self._unfit(f"{type(error).__name__}: {error}") from error
        length = encoded.attention_mask.shape[1]
        columns = torch.arange(length, device=encoded.attention_mask.device)
        last = (encoded.attention_mask * columns).amax(1) - length + theirs.shape[1]
        theirs = theirs[torch.arange(len(last)), last.to(theirs.device)].float()
        gap = float((ours[:, -1].float() - theirs).abs().max() / theirs.abs().max().clamp(min=1))
        least = max(1e-4, 2 * torch.finfo(ours.dtype).eps)
        if not gap <= least:
            names = seen.keys() | given.keys()
            parts = [
                n for n in sorted(names - _OWN) if not _same(seen.get(n), given.get(n), plan.kept_positions, least)
            ]
            which = f"its LLM is given other {', '.join(parts)}" if parts else "its LLM is given the same"
            raise self._unfit(
                f"with every token kept, logits differ from the model's own by {gap:.1e} of the largest, and {which}"
            )

    def _prove_decoding(self, encoded: Encoded) -> None:
        """Let `generate` decode two tokens after half of the video, and look at their positions."""
        if self.convention == "compact":
            return  # what a model counts by itself is right
        kept = [Selection(torch.arange(0, v.features.grid.num_tokens, 2)) for v in encoded.videos]
        inputs = self.build(encoded, encoded.per_row(kept)).inputs
        seen: list[Any] = []
        with self._listening(lambda given: seen.append(given.get("position_ids"))):
            self.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=1)
        prompt = inputs["position_ids"]
        wanted = [prompt, prompt[..., -1:] + 1]
        if len(seen) != len(wanted) or not all(map(_placed, seen, wanted)):
            advice = ": use positions='compact'" if self.position_rows == slice(None) else ""
            raise self._unfit(f"its generate does not hand position_ids on to its LLM{advice}")

    def _run(self, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits (B, L, V) of a call, and the arguments of the LLM in it."""
        seen: dict[str, Any] = {}
        with self._listening(seen.update):
            logits: Tensor = self.model(**call).logits
        return logits, seen

    @contextmanager
    def _listening(self, note: Callable[[dict[str, Any]], object]) -> Iterator[None]:
        """Hand the arguments of each call of the LLM to `note` until the block ends."""
        hook = self.language_model.register_forward_pre_hook(lambda m, args, kwargs: note(kwargs), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _unfit(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"no adapter for {type(self.model).__name__}, and the generic one does not fit: {why}. To add a family, "
            "write a vidsieve.adapters.Adapter and register it: "
            "vidsieve.registry.families.register('ClassName', 'module:Adapter')"
        )


class CountedGenericAdapter(CountedPositions, GenericAdapter):
    """Adapter of an unknown class that counts its positions as text does."""


def lacking(model: Any) -> list[str]:
    """Return in words what of the common contract a model does not have; nothing if it can be tried."""
    inner, forward = getattr(model, "model", None), getattr(type(model), "forward", None)
    takes = signature(forward).parameters if forward is not None else {}
    missing = [
        f"forward takes no {name}" for name in ("mm_encoder_outputs", "pixel_values_videos") if name not in takes
    ]
    encode = getattr(inner, "get_video_features", None)
    if encode is None:
        missing.append("its model has no get_video_features")
    else:
        further = {p.name for p in signature(encode).parameters.values() if _needed(p)} - takes.keys()
        further -= {"pixel_values_videos"}
        missing += [f"get_video_features takes {name}, which forward does not" for name in sorted(further)]
    if not hasattr(getattr(inner, "language_model", None), "layers"):
        missing.append("its model has no language_model.layers")
    if _video_token(getattr(model, "config", None)) < 0:
        missing.append("its configuration states no video_token_id")
    index = getattr(inner, "get_rope_index", None)
    if index is not None:
        places = signature(index).parameters
        missing += [f"get_rope_index takes no {name}" for name in ("mm_token_type_ids",) if name not in places]
        unknown = sorted(places.keys() - takes.keys() - _TEXT)
        missing += [f"get_rope_index takes {name}, which forward does not" for name in unknown]
    return missing


def generic_adapter(model: Any) -> type[GenericAdapter]:
    """Return the adapter class for a model that lacks nothing of the common contract."""
    index = getattr(model.model, "get_rope_index", None)
    takes = signature(type(model).forward).parameters
    of_index = set() if index is None else set(signature(index).parameters)
    keys = [name for name in takes if "video" in name or name in of_index - _TEXT]
    keys.sort(key=lambda name: name != "pixel_values_videos")
    facts = {
        "family": model.config.model_type,
        "video_keys": tuple(keys),
        # Some models make masks of them.
        "column_keys": ("mm_token_type_ids",) if "mm_token_type_ids" in takes else (),
        "__doc__": f"Adapter of `{type(model).__name__}`, by its signatures.",
    }
    return type("Tried", (CountedGenericAdapter if index is None else GenericAdapter,), facts)


def _needed(parameter: Parameter) -> bool:
    named = parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return named and parameter.default is Parameter.empty


def _video_token(config: Any) -> int:
    """Return the id of a video placeholder, −1 where a configuration states none."""
    stated = (getattr(config, name, None) for name in ("video_token_id", "video_token_index"))
    return next((int(number) for number in stated if number is not None), -1)


def _shapes(inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Return the (frames, height, width) of every video, in patches or pixels."""
    if inputs.get("video_grid_thw") is not None:
        return [(t, h, w) for t, h, w in inputs["video_grid_thw"].tolist()]
    pixels = inputs.get("pixel_values_videos")
    if pixels is None or pixels.ndim != 5:
        raise PromptError("neither video_grid_thw nor pixel_values_videos (videos, frames, 3, H, W) tells the frames")
    return [(pixels.shape[1], pixels.shape[3], pixels.shape[4])] * pixels.shape[0]


def _grid(shape: tuple[int, int, int], tokens: int, runs: int) -> TokenGrid:
    """Return the grid of a video of `shape` patches that gives `tokens`; `runs` frames if there are several."""
    t, h, w = shape
    frames = runs if runs > 1 else t
    if tokens % frames:
        raise PromptError(f"{tokens} tokens of a video are no {frames} frames of equal size")
    size = tokens // frames
    step = max(1, math.isqrt(h * w // size))
    if h % step == 0 and w % step == 0 and h * w == step**2 * size:
        return TokenGrid(frames, h // step, w // step)
    return TokenGrid(frames, 1, size)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off until the block ends."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _placed(given: Any, positions: Tensor) -> bool:
    """True if an LLM is given these positions, with a row for text or without."""
    return isinstance(given, Tensor) and torch.equal(given[-3:].to(positions), positions[-3:])


def _same(first: Any, second: Any, kept: Tensor, least: float) -> bool:
    """True if an argument of the LLM is the same in two runs over the same tokens.

    `kept` (B, L) are the columns of the first run's prompts in the order of the second one, −1 on padding.
    """
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(lambda a, b: _same(a, b, kept, least), first, second))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return (first is None) == (second is None)
    if second.ndim == 3 and second.shape[1:] == kept.shape:  # positions, with a row for text or without
        first, second = first[-3:].movedim(0, -1), second[-3:].movedim(0, -1)
    if second.shape[:2] == kept.shape:
        real, first = kept >= 0, first.expand(len(kept), *first.shape[1:])
        rows = real.nonzero()[:, 0]
        first, second = first[rows, kept[real]], second[real]
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), least, least)
