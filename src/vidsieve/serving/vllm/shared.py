"""Settings, request fields and token selection that all served model families share.

A server's settings are ``--hf-overrides '{"vidsieve": {"method": …, "policy": …, "retention": …}}'`` (all fields:
`SETTINGS`). A request's are ``"mm_processor_kwargs": {"vidsieve": {"question": …, "retention": …}}``, which are part of
vLLM's cache key.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Generator, Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.template import Template, template_or_reason
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.calibrated import Calibrated
from vidsieve.errors import BudgetError, NeedError, PromptError, StageError, UnknownNameError, UnsupportedCallError
from vidsieve.loading import load
from vidsieve.retention import parse_budget, parse_retention
from vidsieve.selection import kept_tokens
from vidsieve.serving.vllm.failures import SelectionFailure, report
from vidsieve.types import ENCODER_NEEDS, Need, Stage, TokenGrid, Tokens

LOG = logging.getLogger("vllm.vidsieve")
KEY = "vidsieve"
SETTINGS = ("method", "policy", "retention", "variant", "seed", "on_error")
ON_ERROR = ("fail", "uniform")
"""Outcome of a request whose method raises: an error, or an answer from evenly kept tokens."""
FIELDS = ("question", "retention")
COUNT, PROMPT, TOTAL, REPORT_KEY = "vidsieve_count", "vidsieve_prompt", "vidsieve_total", "vidsieve_report_key"
CARRIED = COUNT, PROMPT, TOTAL, REPORT_KEY
"""Fields that each video carries from vLLM's processor to the model."""


@dataclass(frozen=True)
class VllmSettings:
    """A server's method with its retention, the seed of methods that draw, and the outcome of an error."""

    method: Compressor
    seed: int = 0
    on_error: str = "fail"

    @property
    def reads_question(self) -> bool:
        """True if the method reads the question."""
        return Need.QUESTION in self.method.needs


def settings_of(config: Any) -> VllmSettings | None:
    """Return the settings in a model's configuration; None if it has none, and nothing is pruned.

    Raises
    ------
    UnknownNameError, RetentionError, PolicyError
        If a setting is unknown or wrong.
    StageError, NeedError, BudgetError
        If the method does not act before the LLM, reads the vision encoder's attention, or chooses its own budget.
    """
    fields = dict(getattr(config, KEY, None) or {})
    if not fields:
        return None
    for name in fields:
        if name not in SETTINGS:
            raise UnknownNameError("setting of vidsieve", name, SETTINGS)
    if "method" not in fields:
        raise UnknownNameError("setting of vidsieve (method is missing)", "", SETTINGS)
    options = {"variant": fields["variant"]} if "variant" in fields else {}
    method = load(str(fields["method"]), fields.get("policy"), **options)
    method = method.with_retention(parse_budget(str(fields.get("retention", 0.25))))
    if isinstance(method, Calibrated):  # vLLM places tokens before it encodes a video: their number cannot follow it
        method = method.with_retention(method.rule.fixed)
    if method.acts is not Stage.PRE_LLM:
        raise StageError(f"{method.name} acts {method.acts.value}: vLLM runs methods that act before the LLM")
    if method.front is not None:
        raise StageError(f"{method.front.name} acts {method.front.stage.value}, which vLLM runs itself: leave it out")
    if needs := method.needs & ENCODER_NEEDS:
        names = ", ".join(sorted(need.value for need in needs))
        raise NeedError(f"{method.name} needs {names}: vLLM returns nothing from inside its vision encoder")
    if method.adaptive_budget:
        raise BudgetError(f"{method.name} decides while it runs how much it keeps: vLLM must know beforehand")
    on_error = fields.get("on_error", "fail")
    if on_error not in ON_ERROR:
        raise UnknownNameError("on_error", on_error, ON_ERROR)
    return VllmSettings(method, int(fields.get("seed", 0)), on_error)


def check_engine(vllm_config: Any, own_rate: float | None = None) -> None:
    """Refuse vLLM settings that bypass our pruning; `own_rate` is the pruning rate that we set ourselves.

    Raises
    ------
    UnsupportedCallError
    """
    rate = vllm_config.model_config.multimodal_config.video_pruning_rate
    if rate and rate != own_rate:
        raise UnsupportedCallError(f"--video-pruning-rate {rate} is vLLM's own pruning: leave it out, vidsieve prunes")
    if getattr(vllm_config.compilation_config, "cudagraph_mm_encoder", False):
        raise UnsupportedCallError("cudagraph_mm_encoder hands videos on before they are pruned: leave it out")


@dataclass(frozen=True)
class VideoRequest:
    """The vidsieve fields of a request: the question for the method, and a retention in place of the server's."""

    question: str | None = None
    retention: float | Tokens | None = None


def request_of(kwargs: Mapping[str, Any], settings: VllmSettings | None) -> VideoRequest:
    """Return the vidsieve fields of a request's ``mm_processor_kwargs``.

    Raises
    ------
    PromptError, UnknownNameError, RetentionError
        If a field is wrong, the server does not prune, or the question that its method reads is missing.
    """
    for name in kwargs:
        if name != KEY and get_close_matches(name, [KEY], cutoff=0.8):
            raise UnknownNameError("field of mm_processor_kwargs", name, [KEY])
    fields = kwargs.get(KEY)
    if fields is None:
        fields = {}
    if not isinstance(fields, Mapping):
        raise PromptError(f"vidsieve must be an object with {' and '.join(FIELDS)}, got {type(fields).__name__}")
    if settings is None:
        if fields:
            raise PromptError("this server does not prune: start it with vidsieve in --hf-overrides")
        return VideoRequest()
    for name in fields:
        if name not in FIELDS:
            raise UnknownNameError("field of vidsieve", name, FIELDS)
    question = fields.get("question")
    retention = parse_retention(str(fields["retention"])) if "retention" in fields else None
    if question is not None and (not isinstance(question, str) or not question.strip()):
        raise PromptError("vidsieve.question must be a text that is not empty")
    if settings.reads_question and question is None and retention != 1.0:
        raise PromptError(
            f'{settings.method.name} reads the question: send "mm_processor_kwargs": {{"vidsieve": {{"question": …}}}} '
            "with each video"
        )
    return VideoRequest(question if settings.reads_question else None, retention)


def kept_count(settings: VllmSettings | None, request: VideoRequest, tokens: int) -> int:
    """Return how many of a video's tokens are kept: known before the vision encoder runs."""
    return tokens if settings is None else kept_tokens(retention_in(settings, request), tokens)


def retention_in(settings: VllmSettings, request: VideoRequest) -> float | Tokens:
    """Return the retention of a request: its own, or the server's."""
    return settings.method.retention if request.retention is None else request.retention


def digest(indices: Tensor) -> str:
    """Return the first twelve hexadecimal digits of a selection's SHA-256."""
    return hashlib.sha256(indices.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:12]


def weightless_adapter(
    config: Any, name: str, embed: Callable[[Tensor], Tensor], template: Template | NeedError | None = None
) -> Adapter:
    """Return the adapter of a weightless (meta-device) copy of the model, which computes positions and prompts.

    Parameters
    ----------
    config : the model's configuration
    name : str
        The model's class in transformers.
    embed : callable
        The served model's embeddings (L, D) of ids (L,); the ids are on the video's device.
    template : of the model's processor, for methods that read the question
    """
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, name)(config)
        model.set_input_embeddings(_Embed(embed))
    return adapter_for(model, template)


class _Embed(torch.nn.Module):
    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = embed
        self.register_buffer("weight", torch.empty(0))  # on no device: ids stay on the video's

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids.flatten()).reshape(*ids.shape, -1)


class Selector:
    """Selects the tokens of a video, by the code that `vidsieve.prune` runs.

    Raises
    ------
    NeedError, PolicyMismatchError
        If the method does not fit the model.
    """

    def __init__(self, settings: VllmSettings, adapter: Adapter) -> None:
        self.settings, self.adapter = settings, adapter
        self.adapter.check(settings.method)

    @classmethod
    def of(cls, settings: VllmSettings | None, model: Any, name: str, model_config: Any) -> Selector | None:
        """Return the selector of a served model whose class in transformers is `name`; None without settings.

        From vLLM's `model_config` comes the processor, where the method reads the question.
        """
        if settings is None:
            return None
        LOG.info("vidsieve prunes videos: %s", settings.method.describe())
        template = None
        if settings.reads_question:
            from vllm.transformers_utils.processor import cached_processor_from_config

            template = template_or_reason(cached_processor_from_config(model_config))
        return cls(settings, weightless_adapter(model.config, name, model.language_model.embed_input_ids, template))

    @torch.no_grad()
    def __call__(
        self,
        embeds: Tensor,
        grid: TokenGrid,
        fields: Mapping[str, Any],
        place: int,
        ids: Tensor | None = None,
        tail: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return raster indices (K,) of the kept tokens, their embeddings (K, D), and positions (rows, M) of all ids.

        If the method raises and the video has a report key, the front end is told and K tokens are kept evenly.

        Parameters
        ----------
        embeds : Tensor, (N, D)
        grid : TokenGrid
        fields : mapping
            The `CARRIED` fields of a batch of videos: K, the ids (L,) of the prompt that the method reads, the video a
            single placeholder (empty: just the video), and the report key (KEY_BYTES,) uint8 (None: exceptions are
            raised).
        place : int
            The video's number in the batch.
        ids : Tensor, (M,), int64, optional
            The video's ids in an unpruned prompt: placeholders, and text between them. Default: N + E placeholders.
        tail : Tensor, (E, D), optional
            Tokens outside the grid, which are always kept.
        inputs : mapping, optional
            Further inputs from which the adapter computes positions, as ``video_grid_thw``.
        """
        adapter, count = self.adapter, int(fields[COUNT][place])
        token, outside = adapter.video_token_id, embeds[:0] if tail is None else tail
        prompt = fields[PROMPT][place].flatten().cpu()
        if not len(prompt):
            prompt = torch.tensor([token])
        if ids is None:
            ids = torch.full((grid.num_tokens + len(outside),), token)
        (start,) = (prompt == token).nonzero().flatten().tolist()
        whole = torch.cat([prompt[:start], ids.cpu(), prompt[start + 1 :]])[None].to(embeds.device)
        encoded = adapter.encode(
            {
                "input_ids": whole,
                "attention_mask": torch.ones_like(whole),
                "mm_token_type_ids": torch.zeros_like(whole),
                "mm_encoder_outputs": adapter.ready_features(VideoFeatures(embeds, grid, outside)),
                **(inputs or {}),
            }
        )
        positions = encoded.positions[adapter.position_rows, 0][:, start : start + len(ids)]
        if count == grid.num_tokens:
            return torch.arange(count, device=embeds.device), embeds, positions
        method = self.settings.method.with_retention(Tokens(count))
        try:
            (selection,), _ = adapter.select(encoded, method, Generator().manual_seed(self.settings.seed))
        except Exception as error:  # in vLLM's worker it would end the server, with all its requests
            if fields[REPORT_KEY] is None:
                raise
            LOG.exception("%s failed: of these %d tokens %d are kept evenly instead", method.name, len(embeds), count)
            failure = SelectionFailure.of(method.name, error, self.settings.on_error)
            report(fields[REPORT_KEY][place].flatten(), failure)
            uniform = load("uniform", retention=Tokens(count))
            selection = uniform.compress(adapter.video_tokens(encoded, 0))
        indices = selection.indices.to(embeds.device)
        LOG.info("%s kept %d of %d video tokens, %s", method.name, count, grid.num_tokens, digest(indices))
        kept = embeds[indices] if selection.embeds is None else selection.embeds.to(embeds)
        return indices, kept, positions
