"""Every method on one video and one question: what each keeps, says and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidsieve.answering import PARTS, Answer, answer
from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError, EvaluationError, NeedError, StageError, UnsupportedCallError
from vidsieve.evaluation.runs import versions
from vidsieve.io.faults import contained
from vidsieve.io.machine import spread
from vidsieve.video.reading import Video


def compare(
    model: Any,
    processor: Any,
    video: Video,
    question: str,
    methods: Mapping[str, Compressor],
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return what every method answers, keeps and spends; the first row is the model with all tokens.

    Methods take turns, `repeats` rounds of them after one that is not counted, so that what the machine does meanwhile
    falls on all alike.

    Parameters
    ----------
    methods : name → Compressor
        A method that cannot run on this model, or at this retention, is left out and listed as ``refused``.

    Returns
    -------
    dict
        ``question, repeats, seed, versions, frames, grid, tokens, prompt_tokens, rows, refused``; per row ``name,
        method, variant, part, acts, retention, real_retention, layer_retention, decode_share, indices, answer, same,
        prompt_tokens_after, ms, select_ms, scores``. ``scores``: an array (N,) where a method before the LLM
        scores tokens, else None. ``same``: as with all tokens. ``ms``: ``{min, median, max}`` of each part
        of the work and of their ``total``, without the reading of the file; what a method selects inside the LLM is in
        ``prefill`` there, and in ``select_ms``.

    Raises
    ------
    PromptError, UnsupportedModelError, PolicyMismatchError
        As `answering.answer`.
    """
    asked: dict[str, Compressor | None] = {"full": None, **methods}
    given: dict[str, list[Answer]] = {name: [] for name in asked}
    refused: dict[str, str] = {}
    for turn in range(repeats + 1):
        for number, (name, method) in enumerate(asked.items()):
            if name in refused:
                continue
            with contained(refused, name, BudgetError, NeedError, StageError, UnsupportedCallError):
                said = answer(model, processor, video, question, method, max_new_tokens=max_new_tokens, seed=seed)
                if turn:
                    given[name].append(said)
            if progress:
                progress(turn * len(asked) + number + 1, (repeats + 1) * len(asked))
    if "full" in refused:
        raise EvaluationError(f"the model does not answer with all tokens: {refused['full']}")
    everything = given["full"][0].text
    rows = [_row(name, asked[name], runs, everything) for name, runs in given.items() if runs]
    grid = next((run.traces[0].grid for runs in given.values() for run in runs if run.traces), None)
    return {
        "question": question,
        "repeats": repeats,
        "seed": seed,
        "versions": versions(),
        "frames": len(video.pixels),
        "grid": [grid.frames, grid.height, grid.width] if grid else None,
        "tokens": grid.num_tokens if grid else None,
        "prompt_tokens": given["full"][0].prompt_tokens[0],
        "rows": rows,
        "refused": [{"name": name, "reason": reason} for name, reason in refused.items()],
    }


def _row(name: str, method: Compressor | None, runs: list[Answer], everything: str) -> dict[str, Any]:
    said = runs[0]
    times = {part: spread([run.ms.get(part, 0.0) for run in runs]) for part in PARTS if part != "decode"}
    times["total"] = spread([sum(run.ms.values()) for run in runs])
    row = {
        "name": name,
        "answer": said.text,
        "same": said.text == everything,
        "prompt_tokens_after": said.prompt_tokens[1],
        "ms": times,
        "scores": _scores(said),
        "select_ms": spread([sum(trace.select_ms for trace in run.traces) for run in runs]),
    }
    if method is None:
        return {
            "method": "full",
            "variant": "-",
            "part": "",
            "acts": "-",
            "retention": "1.0",
            "real_retention": 1.0,
            "layer_retention": 1.0,
            "decode_share": None,
            "indices": None,
            **row,
        }
    (trace,) = said.traces
    return {
        "method": method.name,
        "variant": method.variant,
        "part": method.part,
        "acts": method.acts.value,
        "retention": trace.nominal,
        "real_retention": trace.real_retention,
        "layer_retention": trace.layer_retention,
        "decode_share": trace.decoded,
        "indices": list(trace.indices),
        **row,
    }


def _scores(said: Answer) -> NDArray[np.float32] | None:
    given = said.scores[0] if said.scores else None
    return None if given is None else given.float().cpu().numpy()
