"""What the vLLM models share: settings, what a request may ask, and selecting with the same code as under transformers.

A server's settings are ``--hf-overrides '{"vidsieve": {"method": …, "policy": …, "retention": …}}'`` (all of them:
`SETTINGS`); a request's are ``"mm_processor_kwargs": {"vidsieve": {"question": …, "retention": …}}``, which are part of
vLLM's cache key.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Generator, Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.base import Compressor
from vidsieve.errors import (
    BudgetError,
    NeedError,
    PromptError,
    RetentionError,
    StageError,
    UnknownNameError,
    UnsupportedCallError,
)
from vidsieve.loading import load
from vidsieve.selection import kept_tokens
from vidsieve.serving.vllm.failures import SelectionFailure, report
from vidsieve.types import ENCODER_NEEDS, Need, Stage, TokenGrid, Tokens

LOG = logging.getLogger("vllm.vidsieve")
KEY = "vidsieve"
SETTINGS = ("method", "policy", "retention", "variant", "seed", "on_error")
ON_ERROR = ("fail", "uniform")
"""What a request gets whose method raises: an error, or an answer from evenly kept tokens."""
FIELDS = ("question", "retention")
COUNT, PROMPT, TOTAL, REPORT_KEY = "vidsieve_count", "vidsieve_prompt", "vidsieve_total", "vidsieve_report_key"
CARRIED = COUNT, PROMPT, TOTAL, REPORT_KEY
"""What each video has with it on its way from vLLM's processor to the model."""


@dataclass(frozen=True)
class VllmSettings:
    """What a server prunes by: a method at a retention, the seed of methods that draw, what happens when it raises."""

    method: Compressor
    seed: int = 0
    on_error: str = "fail"

    @property
    def asks(self) -> bool:
        """Whether the method reads the question."""
        return Need.QUESTION in self.method.needs


def settings_of(config: Any) -> VllmSettings | None:
    """Return the settings in a model's configuration; None where it has none, and nothing is pruned.

    Raises
    ------
    UnknownNameError, RetentionError, PolicyError
        If a setting is unknown or wrong.
    StageError, NeedError
        If the method does not act before the LLM, or reads the vision encoder's attention.
    """
    given = getattr(config, KEY, None)
    if not given:
        return None
    given = dict(given)
    for name in given:
        if name not in SETTINGS:
            raise UnknownNameError("setting of vidsieve", name, SETTINGS)
    if "method" not in given:
        raise UnknownNameError("setting of vidsieve (method is missing)", "", SETTINGS)
    fields: dict[str, Any] = {"retention": retention_of(given.get("retention", 0.25))}
    if "variant" in given:
        fields["variant"] = given["variant"]
    method = load(str(given["method"]), given.get("policy"), **fields)
    if method.acts is not Stage.PRE_LLM:
        raise StageError(f"{method.name} acts {method.acts.value}: vLLM runs methods that act before the LLM")
    needs = method.needs & ENCODER_NEEDS
    if needs:
        said = ", ".join(sorted(need.value for need in needs))
        raise NeedError(f"{method.name} needs {said}: vLLM gives nothing of the inside of its vision encoder")
    if method.adaptive_budget:
        raise BudgetError(f"{method.name} decides while it runs how much it keeps: vLLM must know beforehand")
    on_error = given.get("on_error", "fail")
    if on_error not in ON_ERROR:
        raise UnknownNameError("on_error", on_error, ON_ERROR)
    return VllmSettings(method, int(given.get("seed", 0)), on_error)


def retention_of(value: Any) -> float | Tokens:
    """Return a retention from JSON: a fraction in (0, 1], or a count as "512t".

    Raises
    ------
    RetentionError
    """
    text = str(value)
    if text.endswith("t") and text[:-1].isdigit() and int(text[:-1]) > 0:
        return Tokens(int(text[:-1]))
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 < number <= 1:
        raise RetentionError(f"retention is a fraction in (0, 1], or a count such as 512t; got {value!r}")
    return number


def settings_in(vllm_config: Any, ours: float | None = None) -> VllmSettings | None:
    """Return what a server prunes by, told in its log; `ours` is the rate that we set in vLLM's settings ourselves.

    Raises
    ------
    UnsupportedCallError
        If settings of vLLM's go around our pruning.
    UnknownNameError, RetentionError, PolicyError, StageError, NeedError
        As `settings_of`.
    """
    settings = settings_of(vllm_config.model_config.hf_config)
    if settings is not None:
        check_engine(vllm_config, ours)
        method = settings.method
        LOG.info(
            "vidsieve prunes videos: %s, retention %s unless a request asks another", method.name, method.retention
        )
    return settings


def check_engine(vllm_config: Any, ours: float | None = None) -> None:
    """Refuse settings of vLLM's that go around our pruning; `ours` is the rate that we set ourselves.

    Raises
    ------
    UnsupportedCallError
    """
    rate = vllm_config.model_config.multimodal_config.video_pruning_rate
    if rate and rate != ours:
        raise UnsupportedCallError(f"--video-pruning-rate {rate} is vLLM's own pruning: leave it out, vidsieve prunes")
    if getattr(vllm_config.compilation_config, "cudagraph_mm_encoder", False):
        raise UnsupportedCallError("cudagraph_mm_encoder hands videos on before they are pruned: leave it out")


@dataclass(frozen=True)
class VideoRequest:
    """What a request asks beside its prompt: the question that a method reads, and a retention of its own."""

    question: str | None = None
    retention: float | Tokens | None = None


def asked_of(kwargs: Mapping[str, Any], settings: VllmSettings | None) -> VideoRequest:
    """Return what a request asks.

    Raises
    ------
    PromptError, UnknownNameError, RetentionError
        If it asks what the server does not do, or leaves the question out that its method reads.
    """
    for name in kwargs:
        if name != KEY and get_close_matches(name, [KEY], cutoff=0.8):
            raise UnknownNameError("field of mm_processor_kwargs", name, [KEY])
    given = kwargs.get(KEY)
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise PromptError(f"vidsieve must be an object with {' and '.join(FIELDS)}, got {type(given).__name__}")
    if settings is None:
        if given:
            raise PromptError("this server does not prune: start it with vidsieve in --hf-overrides")
        return VideoRequest()
    for name in given:
        if name not in FIELDS:
            raise UnknownNameError("field of vidsieve", name, FIELDS)
    question = given.get("question")
    retention = retention_of(given["retention"]) if "retention" in given else None
    if question is not None and (not isinstance(question, str) or not question.strip()):
        raise PromptError("vidsieve.question must be a text that is not empty")
    if settings.asks and question is None and retention != 1.0:
        raise PromptError(
            f'{settings.method.name} reads the question: send "mm_processor_kwargs": {{"vidsieve": {{"question": …}}}} '
            "with each video"
        )
    return VideoRequest(question if settings.asks else None, retention)


def kept_of(settings: VllmSettings | None, asked: VideoRequest, tokens: int) -> int:
    """Return how many of a video's tokens stay: known before the vision encoder runs."""
    if settings is None:
        return tokens
    return kept_tokens(retention_in(settings, asked), tokens)


def retention_in(settings: VllmSettings, asked: VideoRequest) -> float | Tokens:
    """Return the retention of a request: its own, or the server's."""
    return settings.method.retention if asked.retention is None else asked.retention


def carried(fields: Mapping[str, Any], place: int) -> tuple[int, Tensor | None, Tensor]:
    """Return how many tokens of video `place` of a batch stay, its method's prompt, if any, and its report key."""
    prompt = fields[PROMPT][place].flatten()
    return int(fields[COUNT][place]), prompt if len(prompt) else None, fields[REPORT_KEY][place].flatten()


def digest(indices: Tensor) -> str:
    """Return twelve characters that tell one selection from another."""
    return hashlib.sha256(indices.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:12]


class Shadow:
    """The transformers model's own shape without its weights, for the adapter: it places tokens and makes prompts.

    Parameters
    ----------
    config : the model's configuration
    name : str
        The model's class in transformers.
    embed : callable
        From ids (L,) to the embeddings (L, D) of the served model; ids are where the video is.
    """

    def __init__(self, config: Any, name: str, embed: Callable[[Tensor], Tensor]) -> None:
        import transformers

        with torch.device("meta"):
            model = getattr(transformers, name)(config)
            model.set_input_embeddings(_Embed(embed))
        self.adapter: Adapter = adapter_for(model)


class _Embed(torch.nn.Module):
    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = embed
        self.register_buffer("weight", torch.empty(0))  # without a place: ids are wanted where the video is

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids.flatten()).reshape(*ids.shape, -1)


class Selector:
    """Chooses which tokens of a video stay, by the code that `vidsieve.prune` runs.

    Parameters
    ----------
    settings : Settings
    shadow : Shadow

    Raises
    ------
    NeedError, PolicyMismatchError
        If the method does not fit the model.
    """

    def __init__(self, settings: VllmSettings, shadow: Shadow) -> None:
        self.settings, self.adapter = settings, shadow.adapter
        self.adapter.check(settings.method)

    @torch.no_grad()
    def __call__(
        self,
        embeds: Tensor,
        grid: TokenGrid,
        count: int,
        prompt: Tensor | None,
        stands: Tensor | None = None,
        tail: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
        report_key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return raster indices (K,) of what stays, the embeddings (K, D) there, and positions (rows, M) of all ids.

        Parameters
        ----------
        embeds : Tensor, (N, D)
        grid : TokenGrid
        count : int
            K.
        prompt : Tensor, (L,), int64, or None
            The prompt that the method reads, the video a single placeholder; None: just the video.
        stands : Tensor, (M,), int64, optional
            The ids that stand for the video: placeholders, and text between them. Default: N + E placeholders.
        tail : Tensor, (E, D), optional
            Tokens outside the grid, which always stay.
        inputs : mapping, optional
            What else the adapter places tokens by, as ``video_grid_thw``.
        report_key : Tensor, (KEY_BYTES,), uint8, optional
            If the method raises, vLLM's front end is told under this key, and K tokens are kept evenly. Default: the
            exception is raised.
        """
        adapter = self.adapter
        token, outside = adapter.video_token_id, embeds[:0] if tail is None else tail
        ids = torch.tensor([token]) if prompt is None else prompt.cpu()
        (place,) = (ids == token).nonzero().flatten().tolist()
        filled = torch.full((grid.num_tokens + len(outside),), token) if stands is None else stands.cpu()
        ids = torch.cat([ids[:place], filled, ids[place + 1 :]])[None].to(embeds.device)
        call = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.zeros_like(ids),
            "mm_encoder_outputs": adapter.ready_features(VideoFeatures(embeds, grid, outside)),
            **(inputs or {}),
        }
        encoded = adapter.encode(call)
        positions = encoded.positions[adapter.position_rows, 0][:, place : place + len(filled)]
        if count == grid.num_tokens:
            everything = torch.arange(count, device=embeds.device)
            return everything, embeds, positions
        method = self.settings.method.with_retention(Tokens(count))
        try:
            (selection,), _ = adapter.select(encoded, method, Generator().manual_seed(self.settings.seed))
        except Exception as error:  # in vLLM's worker it would end the server, and every request that it has
            if report_key is None:
                raise
            LOG.exception("%s failed: of these %d tokens %d are kept evenly instead", method.name, len(embeds), count)
            report(report_key, SelectionFailure.of(method.name, error, self.settings.on_error))
            method = load("uniform", retention=Tokens(count))
            selection = method.compress(adapter.video_tokens(encoded, 0))
        indices = selection.indices.to(embeds.device)
        LOG.info("%s kept %d of %d video tokens, %s", method.name, count, grid.num_tokens, digest(indices))
        kept = embeds[indices] if selection.embeds is None else selection.embeds.to(embeds)
        return indices, kept, positions
