"""A processor of vLLM that reserves as many placeholders as tokens of a video stay, before anything is encoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement

from vidsieve.adapters.encoded import template_of
from vidsieve.answering import chat_text
from vidsieve.errors import PromptError, VidsieveError
from vidsieve.serving.vllm.failures import KEY_BYTES, report_key
from vidsieve.serving.vllm.shared import (
    CARRIED,
    COUNT,
    KEY,
    PROMPT,
    REPORT_KEY,
    TOTAL,
    VideoRequest,
    VllmSettings,
    asked_of,
    kept_of,
    retention_in,
    settings_of,
)

REMEMBERED = 10_000
"""Videos whose number of tokens is remembered, for the metrics of cached ones."""


class PruningProcessor:
    """Mixed in before a processor of vLLM's; a video carries its count, the prompt that a method reads, and its key."""

    info: Any

    def tokens_of(self, place: int, items: Any, fields: Any) -> tuple[int, int]:
        """Return how many tokens video `place` has in its grid, and outside it."""
        raise NotImplementedError

    # -- what vLLM calls ------------------------------------------------------------------------------------

    def get_dummy_inputs(self, *arguments: Any, **options: Any) -> Any:
        """Return vLLM's largest input for measuring memory: no token of it is dropped, as a request may ask."""
        made = super().get_dummy_inputs(*arguments, **options)  # type: ignore[misc]
        if self._settings() is not None:
            made.hf_processor_mm_kwargs = {**made.hf_processor_mm_kwargs, KEY: {"retention": 1.0}}
        return made

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Return vLLM's inputs, and count for the metrics page what stays of their videos."""
        if self._settings() is not None:
            self._check_placeholders(inputs)  # first: a video that vLLM has cached by then is not with its engine
        made = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        ranges, hashes = (made[name].get("video", []) for name in ("mm_placeholders", "mm_hashes"))
        for place, (span, key) in enumerate(zip(ranges, hashes, strict=False)):
            item = made["mm_kwargs"]["video"][place]
            if item is not None and TOTAL in item:  # None: cached, its total is known
                total, outside = item[TOTAL].data.tolist()
                self._totals()[key] = total, outside
            if key in self._totals():
                self._totals().move_to_end(key)
                total, outside = self._totals()[key]
                counted(span.length - outside, total)
            while len(self._totals()) > REMEMBERED:
                self._totals().popitem(last=False)
        return made

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Return vLLM's keys, the same for requests that keep the same tokens, however they say so."""
        settings, asked = self._asked(inputs.hf_processor_mm_kwargs)
        if settings is not None:
            same = {"question": asked.question, "retention": str(retention_in(settings, asked))}
            inputs = replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: same})
        return super()._get_mm_hashes(inputs)  # type: ignore[misc]

    def _totals(self) -> OrderedDict[str, tuple[int, int]]:
        found: OrderedDict[str, tuple[int, int]] = self.__dict__.setdefault("_vidsieve_totals", OrderedDict())
        return found

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        settings, asked = self._asked(hf_kwargs)
        made = super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]
        videos = mm_items.get_count("video", strict=False)
        if settings is not None and videos:
            sizes = [self.tokens_of(place, mm_items, made) for place in range(videos)]
            made[COUNT] = torch.tensor([kept_of(settings, asked, grid) for grid, _ in sizes])
            made[TOTAL] = torch.tensor(sizes)
            made[REPORT_KEY] = torch.zeros(videos, KEY_BYTES, dtype=torch.uint8)  # see _write_keys
            made[PROMPT] = self._prompt(asked).expand(videos, -1)
        return made

    def _apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        made = super()._apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        _write_keys(made.kwargs, made.hashes.get("video", []))
        return made

    def _merge_mm_kwargs(
        self, cache: Any, mm_hashes: Any, mm_is_cached: Any, mm_missing_kwargs: Any, mm_missing_prompt_updates: Any
    ) -> Any:
        found = zip(mm_hashes.get("video", []), mm_is_cached.get("video", []), strict=True)
        _write_keys(mm_missing_kwargs, [name for name, is_cached in found if not is_cached])
        return super()._merge_mm_kwargs(  # type: ignore[misc]
            cache, mm_hashes, mm_is_cached, mm_missing_kwargs, mm_missing_prompt_updates
        )

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        config = dict(super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs)))  # type: ignore[misc]
        ours = {name: MultiModalFieldConfig.batched("video", keep_on_cpu=True) for name in CARRIED if name in hf_inputs}
        return config | ours

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        settings, asked = self._asked(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items=mm_items, hf_processor_mm_kwargs=_without(hf_processor_mm_kwargs), out_mm_kwargs=out_mm_kwargs
        )
        if settings is None:
            return list(updates)
        token = self._placeholder("video")

        def placeholders(place: int) -> list[int]:
            grid, outside = self.tokens_of(place, mm_items, out_mm_kwargs)
            return [token] * (kept_of(settings, asked, grid) + outside)

        others = [update for update in updates if update.modality != "video"]
        return [*others, PromptReplacement(modality="video", target=[token], replacement=placeholders)]

    def _check_placeholders(self, inputs: Any) -> None:
        """Refuse a prompt that writes placeholders out: the model would take them for a part of a video."""
        counts = inputs.mm_data_items.get_all_counts()
        for name in ("video", "image"):
            if inputs.prompt.count(self._placeholder(name)) > counts.get(name, 0):
                raise ValueError(f"the prompt holds the placeholder of {name}s in its text: leave it out")

    def _placeholder(self, kind: str) -> int:
        """Return the id that stands for a video or an image; families name it differently."""
        config = self.info.get_hf_config()
        return int(
            next(t for end in ("id", "index") if (t := getattr(config, f"{kind}_token_{end}", None)) is not None)
        )

    # -- ours -----------------------------------------------------------------------------------------------

    def _settings(self) -> VllmSettings | None:
        if "_vidsieve" not in self.__dict__:
            self.__dict__["_vidsieve"] = settings_of(self.info.get_hf_config())
        found: VllmSettings | None = self.__dict__["_vidsieve"]
        return found

    def _asked(self, kwargs: Mapping[str, object]) -> tuple[VllmSettings | None, VideoRequest]:
        settings = self._settings()
        with _told():
            return settings, asked_of(kwargs, settings)

    def _prompt(self, asked: VideoRequest) -> Tensor:
        """Return the ids (1, L) of the prompt that a method reads, the video a single placeholder; (1, 0) for none."""
        if asked.question is None:
            return torch.empty(1, 0, dtype=torch.int64)
        processor, most = self.info.get_hf_processor(), self.info.ctx.model_config.max_model_len
        with _told():
            found: Tensor = processor.tokenizer(chat_text(processor, asked.question), return_tensors="pt")["input_ids"]
            if found.shape[1] > most:
                raise PromptError(f"vidsieve.question has {found.shape[1]} tokens; this server's limit is {most}")
            template_of(self.info.get_hf_config()).question_mask(found[0])  # the worker has nobody to tell
        return found


@contextmanager
def _told() -> Iterator[None]:
    """Raise our errors as what vLLM takes for the request's own fault, 400."""
    try:
        yield
    except VidsieveError as error:
        raise ValueError(str(error)) from None


@cache
def _counters() -> tuple[Any, Any]:
    from prometheus_client import Counter

    said = "Tokens of videos in prompts"
    return Counter("vidsieve_video_tokens", said), Counter("vidsieve_video_tokens_kept", f"{said} that were kept")


def counted(kept: int, total: int) -> None:
    """Add a video to the metrics ``vidsieve_video_tokens_total`` and ``vidsieve_video_tokens_kept_total``."""
    all_of_them, those_kept = _counters()
    all_of_them.inc(total)
    those_kept.inc(kept)


def _write_keys(items: Any, names: Sequence[str]) -> None:
    """Write the report keys of videos, given with their names in vLLM's caches, before they are cached themselves."""
    for item, name in zip(items.get("video", []), names, strict=True):
        if REPORT_KEY in item:
            item[REPORT_KEY].data.copy_(report_key(name))


def _without(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in kwargs.items() if name != KEY}
