"""The contract of compressors as small named checks, which run on every registered method."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.compressors.inside import DecodeCompressor, DecodeView, LayerCompressor, Rows
from vidsieve.errors import BudgetError, NeedError, RetentionError, UnknownNameError
from vidsieve.selection import exact_ratio, kept_tokens
from vidsieve.testing.views import GivenView
from vidsieve.types import (
    EncoderOutputs,
    Need,
    Prompt,
    Selection,
    TokenGrid,
    Tokens,
    VideoTokens,
)

WIDTH = 32
GRIDS = (TokenGrid(8, 5, 7), TokenGrid(3, 4, 4), TokenGrid(16, 6, 6))
RETENTIONS = (0.02, 0.1, 0.25, 0.29, 0.5, 0.99)

Method = type[Compressor]
Check = Callable[[Method], None]


class CheckFailure(AssertionError):
    """A compressor breaks the contract."""


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailure(message)


def _expect_error(error: type[Exception], call: Callable[[], Any], message: str) -> None:
    try:
        call()
    except error:
        return
    raise CheckFailure(message)


def make_video(
    grid: TokenGrid, width: int = WIDTH, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> VideoTokens:
    """Return a video of smooth drifting random tokens inside a short prompt with a question, and encoder signals."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(1, grid.per_frame, width, generator=draw)
    steps = torch.randn(grid.frames, grid.per_frame, width, generator=draw).cumsum(0) * 0.3
    tokens = (base + steps).reshape(-1, width).to(dtype)
    before, after = 3, 6
    length = before + grid.num_tokens + after
    embeds = torch.randn(length, width, generator=draw).to(dtype)
    embeds[before : before + grid.num_tokens] = tokens
    video_mask = torch.zeros(length, dtype=torch.bool)
    video_mask[before : before + grid.num_tokens] = True
    question = torch.zeros(length, dtype=torch.bool)
    question[-after:-1] = True
    positions = torch.arange(length)[None]
    encoder = EncoderOutputs(torch.rand(grid.num_tokens, generator=draw), tokens[:, : width // 2].clone())
    prompt = Prompt(embeds, positions, video_mask, question)
    return VideoTokens(tokens, grid, positions[:, video_mask], prompt, encoder)


def example(method: Method, **fields: Any) -> Compressor:
    """Return an instance: random weights for a trained method, the part before the LLM for one with two parts."""
    untrained = getattr(method, "untrained", None)
    if issubclass(method, LayerCompressor) and _has_parts(method):
        fields = {"inner": False} | fields
    compressor: Compressor = untrained(WIDTH, **fields) if untrained else method(**fields)
    return compressor


def _has_parts(method: Method) -> bool:
    return "inner" in {field.name for field in dataclasses.fields(method)}


def _compress(compressor: Compressor, video: VideoTokens, seed: int = 0) -> Selection:
    return compressor.compress(video, generator=torch.Generator().manual_seed(seed))


def _reachable(compressor: Compressor, video: VideoTokens) -> bool:
    """True if a method can reach its budget on this video; False if it refuses."""
    try:
        compressor.budget(video)
    except BudgetError:
        message = f"{compressor.describe()} has no budget for a grid of {video.grid}, and keeps some"
        _expect_error(BudgetError, lambda: _compress(compressor, video), message)
        return False
    return True


def check_exact_budget(method: Method) -> None:
    """Every selection has exactly the budgeted size, at every retention, grid and variant, or is refused."""
    for variant in method.variants:
        reached = 0
        for grid in GRIDS:
            video = make_video(grid)
            for retention in RETENTIONS:
                compressor = example(method, retention=retention, variant=variant)
                if not _reachable(compressor, video):
                    continue
                kept, reached = _compress(compressor, video).num_kept, reached + 1
                budget = compressor.budget(video)
                _expect(kept == budget, f"{variant} at {retention} of {grid}: kept {kept}, budget {budget}")
        _expect(reached >= len(RETENTIONS) // 2, f"{variant} refuses almost every budget")


def check_token_count_budget(method: Method) -> None:
    """``retention=Tokens(k)`` keeps k tokens."""
    for count in (1, 7, 100):
        compressor, video = example(method, retention=Tokens(count)), make_video(GRIDS[0])
        if count < 100 and not _reachable(compressor, video):
            continue
        kept = _compress(compressor, video).num_kept
        _expect(kept == count, f"Tokens({count}) kept {kept}")


def check_indices_in_range(method: Method) -> None:
    """Indices lie on the grid; `Selection` itself checks that they are sorted and unique."""
    for grid in GRIDS:
        if not _reachable(example(method), make_video(grid)):
            continue
        chosen = _compress(example(method), make_video(grid)).indices
        _expect(int(chosen[-1]) < grid.num_tokens, f"index {int(chosen[-1])} on a grid of {grid.num_tokens} tokens")


def check_deterministic(method: Method) -> None:
    """The same video and seed give the same selection."""
    for variant in method.variants:
        compressor, video = example(method, variant=variant), make_video(GRIDS[0])
        first, second = _compress(compressor, video, 7), _compress(compressor, video, 7)
        _expect(torch.equal(first.indices, second.indices), f"{variant}: two runs keep different tokens")
        if first.embeds is not None and second.embeds is not None:
            _expect(torch.equal(first.embeds, second.embeds), f"{variant}: two runs merge differently")


def check_full_retention_is_identity(method: Method) -> None:
    """Retention 1.0 keeps every token, untouched."""
    video = make_video(GRIDS[1])
    chosen = _compress(example(method, retention=1.0), video)
    _expect(torch.equal(chosen.indices, torch.arange(video.num_tokens)), "retention 1.0 dropped tokens")
    same = chosen.embeds is None or torch.equal(chosen.embeds, video.embeds)
    _expect(same, "retention 1.0 changed tokens")


def check_dtype_and_device(method: Method) -> None:
    """Half-precision tokens work; the selection has their dtype and device."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        video = make_video(GRIDS[0], dtype=dtype)
        chosen = _compress(example(method), video)
        _expect(chosen.indices.device == video.embeds.device, "indices moved to another device")
        _expect(chosen.embeds is None or chosen.embeds.dtype == dtype, f"merged tokens are not {dtype}")


def check_tokens_with_gradients(method: Method) -> None:
    """Tokens that carry gradients are chosen as others are, and where tokens are merged the gradients reach them."""
    plain, carrying = make_video(GRIDS[0]), make_video(GRIDS[0])
    carrying.embeds.requires_grad_()
    with torch.enable_grad():
        chosen = _compress(example(method), carrying)
    _expect(torch.equal(chosen.indices, _compress(example(method), plain).indices), "gradients changed the choice")
    if chosen.embeds is not None:
        _expect(chosen.embeds.requires_grad, "merged tokens carry no gradients")
        (grad,) = torch.autograd.grad(chosen.embeds.sum(), carrying.embeds)
        _expect(bool(grad.any()), "no gradient reaches the tokens")


def check_one_frame_and_one_token(method: Method) -> None:
    """A single frame works, and a single token is kept whatever the retention."""
    half, frame = example(method, retention=0.5), make_video(TokenGrid(1, 4, 4))
    _expect(not _reachable(half, frame) or _compress(half, frame).num_kept == 8, "one frame")
    _expect(_compress(example(method, retention=0.1), make_video(TokenGrid(1, 1, 1))).num_kept == 1, "one token")


def check_inputs_not_changed(method: Method) -> None:
    """`compress` does not change its input."""
    video = make_video(GRIDS[0])
    tensors = {"embeds": video.embeds, "positions": video.positions}
    assert video.prompt is not None
    tensors |= {f"prompt.{f.name}": getattr(video.prompt, f.name) for f in dataclasses.fields(video.prompt)}
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in tensors.items()}
    _compress(example(method), video)
    for name, tensor in tensors.items():
        _expect(torch.equal(before[name], tensor), f"{name} was changed")


def check_duplicate_tokens(method: Method) -> None:
    """A video of equal frames still gives the exact budget."""
    video = make_video(GRIDS[1])
    still = video.embeds[: video.grid.per_frame].repeat(video.grid.frames, 1)
    chosen = _compress(example(method, retention=0.5), dataclasses.replace(video, embeds=still))
    _expect(chosen.num_kept == video.num_tokens // 2, f"kept {chosen.num_kept} of {video.num_tokens} at 0.5")


def check_picklable(method: Method) -> None:
    """An instance survives pickling with its fields."""
    compressor = example(method, retention=0.3)
    again = pickle.loads(pickle.dumps(compressor))
    _expect(again.retention == 0.3 and type(again) is type(compressor), "pickling changed the instance")


def check_default_constructible(method: Method) -> None:
    """The class can be constructed without arguments."""
    method()


def check_bad_fields_refused(method: Method) -> None:
    """The constructor refuses a retention outside (0, 1] and an unknown variant."""
    for retention in (0, 1.5, -0.1, float("nan"), "abc", None, True):
        _expect_error(
            RetentionError,
            lambda value=retention: method(retention=value),  # type: ignore[misc]
            f"retention {retention!r} was accepted",
        )
    _expect_error(UnknownNameError, lambda: method(variant="no such variant"), "an unknown variant was accepted")


def check_documented(method: Method) -> None:
    """The class has a docstring of more than 15 words and names its paper."""
    text = method.__doc__ or ""
    _expect(len(text.split()) > 15, "the class docstring must say what is kept and why, in more than 15 words")
    _expect(bool(method.paper), "no paper is named")
    _expect(method.name.isidentifier(), f"{method.name!r} is no identifier")


def check_needs_enforced(method: Method) -> None:
    """A method that reads the question refuses a video without a prompt."""
    if Need.QUESTION in method.needs:
        bare = dataclasses.replace(make_video(GRIDS[1]), prompt=None)
        _expect_error(NeedError, lambda: example(method).compress(bare), "a video without a prompt was accepted")


def check_blind_unless_declared(method: Method) -> None:
    """Without `Need.QUESTION`, a different prompt does not change the selection."""
    if Need.QUESTION in method.needs:
        return
    video = make_video(GRIDS[0])
    prompt = video.prompt
    assert prompt is not None
    other = dataclasses.replace(prompt, embeds=prompt.embeds.flip(0))
    first, second = (_compress(example(method), some) for some in (video, dataclasses.replace(video, prompt=other)))
    _expect(torch.equal(first.indices, second.indices), "the question changed what is kept, but is not a declared need")


def check_layer_budget(method: Method) -> None:
    """Layers see, on average, the fraction asked for or at most one token a stage less; or the budget is refused."""
    assert issubclass(method, LayerCompressor)
    for depth, tokens in ((28, 6272), (32, 576), (12, 196)):
        for retention in (0.02, 0.25, 0.5, 0.9, Tokens(tokens // 2), Tokens(tokens - 1), Tokens(tokens)):
            compressor = method(retention=retention)
            try:
                outer = compressor.outer(depth)
                entering = tokens if outer is None else kept_tokens(outer.retention, tokens)
                stages = compressor.stages(depth, entering)
            except BudgetError:
                _expect(retention != Tokens(tokens), f"{tokens} of {tokens} tokens are refused")
                continue
            edges = [*(layer for layer, _ in stages), depth]
            alive = [entering, *(keep for _, keep in stages)]
            seen = sum(count * (b - a) for count, a, b in zip(alive, [0, *edges], edges, strict=False))
            _expect(edges == sorted(set(edges)) and edges[0] >= 1, f"stages {stages} are not in order")
            _expect(
                -1e-6
                <= exact_ratio(retention, tokens) * depth * tokens - seen
                <= depth * (len(stages) + (outer is not None)),
                f"{retention} of {tokens} tokens in {depth} layers: {stages} sees {seen}",
            )


def check_layer_step(method: Method) -> None:
    """`step` keeps exactly as many tokens as asked for, the same every time."""
    assert issubclass(method, LayerCompressor)
    compressor = method()
    draw = torch.Generator().manual_seed(0)
    for grid in GRIDS:
        alive = torch.randperm(grid.num_tokens, generator=draw)[: grid.num_tokens // 2].sort().values
        count = len(alive)
        weights = torch.rand(4, 1, count, generator=draw)
        tensors = {name: torch.rand(count, 8) for name in ("hidden", "before", "video")}
        tensors |= {"text": torch.rand(2, 8), "rope_bias": torch.ones(2, count)}
        for attention in (weights, torch.ones_like(weights)):
            given = attention.clone()
            rows: dict[tuple[Rows, int], Tensor] = {}
            for layer in (2, 3):
                rows |= {("last", layer): given, ("text", layer): given.repeat(1, 2, 1)}
            before = {key: value.clone() for key, value in rows.items()}
            view = GivenView(3, 28, grid, alive, (grid.num_tokens, count, count), rows=rows, tensors=tensors)
            for keep in (1, count // 3, count):
                choice, again = compressor.step(view, keep), compressor.step(view, keep)
                _expect(len(choice.indices) == keep, f"{keep} asked for, not {len(choice.indices)}")
                _expect(int(choice.indices[-1]) < count, "positions lie outside the view")
                _expect(torch.equal(choice.indices, again.indices), "two calls differ")
            _expect(all(torch.equal(rows[key], before[key]) for key in rows), "`step` changed its view")


def check_read(method: Method) -> None:
    """`read` returns sorted unique positions of the cached tokens, the same every time, or None for all."""
    assert issubclass(method, DecodeCompressor)
    draw = torch.Generator().manual_seed(0)
    for variant in method.variants:
        compressor = method(variant=variant)
        _expect(1 <= compressor.first_layer(28) < 28, "the first layer that reads less has none before it")
        for grid in (*GRIDS, TokenGrid(1, 1, 1)):
            cached = torch.randperm(grid.num_tokens, generator=draw)[: -(-grid.num_tokens // 2)].sort().values
            before = None
            for attention in (torch.rand(4, len(cached), generator=draw), torch.ones(4, len(cached))):
                view = DecodeView(3, grid, cached, attention.clone())
                read, again = compressor.read(view, before), compressor.read(view, before)
                _expect(torch.equal(view.attention, attention), "`read` changed its view")
                before = dataclasses.replace(view, read=read)
                if read is None or again is None:
                    _expect(read is again, "two calls differ")
                    continue
                _expect(torch.equal(read, again), "two calls differ")
                _expect(read.dtype == torch.int64 and bool((read[1:] > read[:-1]).all()), "not sorted and unique")
                _expect(int(read[0]) >= 0 and int(read[-1]) < len(cached), "positions lie outside the cache")


CHECKS: tuple[Check, ...] = (
    check_exact_budget,
    check_token_count_budget,
    check_indices_in_range,
    check_deterministic,
    check_full_retention_is_identity,
    check_dtype_and_device,
    check_one_frame_and_one_token,
    check_inputs_not_changed,
    check_tokens_with_gradients,
    check_duplicate_tokens,
    check_picklable,
    check_default_constructible,
    check_bad_fields_refused,
    check_documented,
    check_needs_enforced,
    check_blind_unless_declared,
)


LAYER_CHECKS: tuple[Check, ...] = (
    check_layer_budget,
    check_layer_step,
    check_picklable,
    check_default_constructible,
    check_bad_fields_refused,
    check_documented,
)


def checks_of(method: Method) -> tuple[Check, ...]:
    """Return the checks of a method, by where it acts."""
    if issubclass(method, LayerCompressor):
        return tuple(dict.fromkeys((*CHECKS, *LAYER_CHECKS))) if _has_parts(method) else LAYER_CHECKS
    return (*CHECKS, check_read) if issubclass(method, DecodeCompressor) else CHECKS


def check_compressor(method: Method) -> None:
    """Run every check on one class.

    Raises
    ------
    CheckFailure
        At the first check that fails and is not among the class's `expected_failures`.
    """
    for check in checks_of(method):
        if check.__name__ not in method.expected_failures:
            check(method)


def parametrize_with_checks(methods: Iterable[Method]) -> Any:
    """Return a pytest decorator over (method, check); declared failures become strict xfails with their reason."""
    import pytest

    cases = []
    for method in methods:
        for check in checks_of(method):
            reason = method.expected_failures.get(check.__name__)
            marks = [pytest.mark.xfail(reason=reason, raises=CheckFailure, strict=True)] if reason else []
            cases.append(pytest.param(method, check, id=f"{method.name}-{check.__name__}", marks=marks))
    return pytest.mark.parametrize(("method", "check"), cases)
