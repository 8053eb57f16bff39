"""A vLLM processor that reserves one placeholder per kept token of a video, before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement

from vidsieve.adapters.template import Template
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
    kept_count,
    request_of,
    retention_in,
    settings_of,
)


class PruningProcessor:
    """Mixed in before a vLLM processor; it adds the `CARRIED` fields to each video."""

    info: Any

    def tokens_of(self, place: int, items: Any, fields: Any) -> tuple[int, int]:
        """Return the numbers of tokens of video `place` in its grid, and outside it."""
        raise NotImplementedError

    # -- called by vLLM ---------------------------------------------------------------------------------------

    def get_dummy_inputs(self, *arguments: Any, **options: Any) -> Any:
        """Return vLLM's largest input for measuring memory, without pruning: a request may ask for that."""
        inputs = super().get_dummy_inputs(*arguments, **options)  # type: ignore[misc]
        if self._settings is not None:
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, KEY: {"retention": 1.0}}
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Return vLLM's inputs, and count the kept tokens of their videos for the metrics page."""
        if self._settings is not None:
            self._check_placeholders(inputs)  # first: a video that vLLM caches must reach its engine
        processed = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        ranges, hashes = (processed[name].get("video", []) for name in ("mm_placeholders", "mm_hashes"))
        for place, (span, key) in enumerate(zip(ranges, hashes, strict=False)):
            item = processed["mm_kwargs"]["video"][place]
            if item is not None and TOTAL in item:  # None: vLLM has the video cached
                self._totals[key] = item[TOTAL].data.tolist()
            if key in self._totals:
                total, outside = self._totals[key]
                count_tokens(span.length - outside, total)
        return processed

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Return vLLM's keys, equal for requests that keep the same tokens, however they word it."""
        settings, request = self._request(inputs.hf_processor_mm_kwargs)
        if settings is not None:
            fields = {"question": request.question, "retention": str(retention_in(settings, request))}
            inputs = replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: fields})
        return super()._get_mm_hashes(inputs)  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        settings, request = self._request(hf_kwargs)
        outputs = super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]
        videos = mm_items.get_count("video", strict=False)
        if settings is not None and videos:
            sizes = [self.tokens_of(place, mm_items, outputs) for place in range(videos)]
            outputs[COUNT] = torch.tensor([kept_count(settings, request, grid) for grid, _ in sizes])
            outputs[TOTAL] = torch.tensor(sizes)
            outputs[REPORT_KEY] = torch.zeros(videos, KEY_BYTES, dtype=torch.uint8)  # filled in by _write_keys
            outputs[PROMPT] = self._prompt(request).expand(videos, -1)
        return outputs

    def _apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        processed = super()._apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        _write_keys(processed.kwargs, processed.hashes.get("video", []))
        return processed

    def _merge_mm_kwargs(
        self, cache: Any, mm_hashes: Any, mm_is_cached: Any, mm_missing_kwargs: Any, mm_missing_prompt_updates: Any
    ) -> Any:
        videos = zip(mm_hashes.get("video", []), mm_is_cached.get("video", []), strict=True)
        _write_keys(mm_missing_kwargs, [name for name, is_cached in videos if not is_cached])
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
        settings, request = self._request(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items=mm_items, hf_processor_mm_kwargs=_without(hf_processor_mm_kwargs), out_mm_kwargs=out_mm_kwargs
        )
        if settings is None:
            return list(updates)
        token = self._placeholder("video")

        def placeholders(place: int) -> list[int]:
            grid, outside = self.tokens_of(place, mm_items, out_mm_kwargs)
            return [token] * (kept_count(settings, request, grid) + outside)

        others = [update for update in updates if update.modality != "video"]
        return [*others, PromptReplacement(modality="video", target=[token], replacement=placeholders)]

    def _check_placeholders(self, inputs: Any) -> None:
        """Refuse placeholders in the text of a prompt: the model would take them for parts of a video."""
        counts = inputs.mm_data_items.get_all_counts()
        for name in ("video", "image"):
            if inputs.prompt.count(self._placeholder(name)) > counts.get(name, 0):
                raise ValueError(f"the prompt holds the placeholder of {name}s in its text: leave it out")

    def _placeholder(self, kind: str) -> int:
        """Return the placeholder id of a video or an image."""
        return int(getattr(self.info.get_hf_config(), f"{kind}_token_id"))

    # -- our own ----------------------------------------------------------------------------------------------

    @cached_property
    def _settings(self) -> VllmSettings | None:
        return settings_of(self.info.get_hf_config())

    @cached_property
    def _totals(self) -> LRUCache[str, tuple[int, int]]:
        """Numbers of tokens of the latest videos by vLLM's key, for the metrics of cached ones."""
        return LRUCache(10_000)

    @cached_property
    def _template(self) -> Template:
        return Template.of(self.info.get_hf_processor())

    def _request(self, kwargs: Mapping[str, object]) -> tuple[VllmSettings | None, VideoRequest]:
        with _client_errors():
            return self._settings, request_of(kwargs, self._settings)

    def _prompt(self, request: VideoRequest) -> Tensor:
        """Return the ids (1, L) of the prompt that a method reads, the video a single placeholder; (1, 0) for none."""
        if request.question is None:
            return torch.empty(1, 0, dtype=torch.int64)
        processor, limit = self.info.get_hf_processor(), self.info.ctx.model_config.max_model_len
        with _client_errors():
            text = chat_text(processor, request.question)
            ids: Tensor = processor.tokenizer(text, return_tensors="pt")["input_ids"]
            if ids.shape[1] > limit:
                raise PromptError(f"vidsieve.question has {ids.shape[1]} tokens; this server's limit is {limit}")
            self._template.question_mask(ids[0])  # raises here: the worker cannot
        return ids


@contextmanager
def _client_errors() -> Iterator[None]:
    """Turn our errors into ValueError, which vLLM answers with status 400."""
    try:
        yield
    except VidsieveError as error:
        raise ValueError(str(error)) from None


@cache
def _counters() -> tuple[Any, Any]:
    from prometheus_client import Counter

    about = "Tokens of videos in prompts"
    return Counter("vidsieve_video_tokens", about), Counter("vidsieve_video_tokens_kept", f"{about} that were kept")


def count_tokens(kept: int, total: int) -> None:
    """Add a video to the metrics ``vidsieve_video_tokens_total`` and ``vidsieve_video_tokens_kept_total``."""
    totals, kept_ones = _counters()
    totals.inc(total)
    kept_ones.inc(kept)


def _write_keys(items: Any, names: Sequence[str]) -> None:
    """Write the report keys of videos, given their names in vLLM's caches, before the videos are cached."""
    for item, name in zip(items.get("video", []), names, strict=True):
        if REPORT_KEY in item:
            item[REPORT_KEY].data.copy_(report_key(name))


def _without(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in kwargs.items() if name != KEY}
