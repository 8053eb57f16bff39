"""What one GPU shows: tiny models of every family, and 7B models with random weights, pruned against masked.

LLaVA-OneVision-7B and Qwen2.5-VL-7B are built from their published configurations with random weights, so answers mean
nothing, and equality, memory and time mean what they say. ``--small`` runs the same on tiny models on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import synchronise
from vidsieve.compressors.inside import LayerCompressor
from vidsieve.evaluation.blueprints import random_model
from vidsieve.io.machine import machine, spread, write_result
from vidsieve.testing.calls import CALLS, STEPS, Case
from vidsieve.testing.equivalence import TOLERANCE, cell
from vidsieve.testing.reference import reference_greedy, reference_logits
from vidsieve.testing.staged import LayeredSelections
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import Selection

RUNS = 5


def methods(small: bool) -> list[tuple[str, float]]:
    """Return methods and retentions; two of the tiny models' three layers see every token, which is FastV's floor."""
    inside = ("fastv", 0.8 if small else 0.25)
    return [("random", 0.25), ("divprune", 0.25), ("divprune", 0.1), ("visionzip", 0.25), inside]


LARGE = {"llava_onevision": "llava-onevision-7b", "qwen2_5_vl": "qwen2.5-vl-7b"}


def build(family: str, dtype: torch.dtype, device: str, small: bool) -> Any:
    """Return a model with random weights on the device."""
    if small:
        return FAMILIES[family]().to(device, dtype)
    return random_model(LARGE[family], dtype=dtype, device=device).model


def prompts(
    model: Any,
    family: str,
    frames: int,
    words: list[int],
    device: str,
    small: bool,
    patches: tuple[int, int] = (28, 36),
) -> dict[str, Tensor]:
    """Return a batch of prompts as the family's processor makes them, padded on the left; random words and pixels.

    `patches` are the rows and columns of a frame of Qwen2.5-VL: about 392 × 504 pixels unless given.
    """
    if small:
        grids = [[default_grid(family, frames)] for _ in words]
        return {k: v.to(device) for k, v in inputs_for(family, grids, words=words).items()}
    draw = torch.Generator().manual_seed(1)
    config, batch = model.config, len(words)
    made: dict[str, Tensor] = {}
    if family == "llava_onevision":
        count = frames * 14 * 14 + 1
        made["pixel_values_videos"] = torch.randn(batch, frames, 3, 384, 384, generator=draw).to(device)
        video = [config.video_token_id] * count
    else:
        grid = (frames // 2, *patches)  # two frames a token
        made["video_grid_thw"] = torch.tensor([grid] * batch)
        count = batch * grid[0] * grid[1] * grid[2]
        made["pixel_values_videos"] = torch.randn(count, 3 * 2 * 14 * 14, generator=draw).to(device)
        made["second_per_grid_ts"] = torch.full((batch,), 1.0)
        video = [151652, *[config.video_token_id] * (grid[0] * grid[1] * grid[2] // 4), 151653]
    rows = []
    for count in words:
        question = torch.randint(1000, 100_000, (count,), generator=draw).tolist()
        rows.append([151644, 872, 198, *video, *question, 151645, 198, 151644, 77091, 198])
    length = max(map(len, rows))
    made["input_ids"] = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    made["attention_mask"] = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    if "video_grid_thw" in made:
        made["mm_token_type_ids"] = 2 * (made["input_ids"] == config.video_token_id).long()
    return {key: value.to(device) for key, value in made.items()}


def tiny(device: str) -> Iterator[dict[str, Any]]:
    """Yield the cells of the equivalence table on this device: every family and call, three methods."""
    for name, retention in {"random": 0.3, "visionzip": 0.4, "fastv": 0.8}.items():
        for family in FAMILIES:
            for batch in ("ragged batch 2", "video and image"):
                for call in [*CALLS, *(["device map"] if batch == "ragged batch 2" else [])]:
                    method = vidsieve.load(name, retention=retention)
                    found = cell(family, batch, call, "sdpa", method, device=device)
                    yield {"method": name, **asdict(found), "passed": found.passed}


def exactness(model: Any, family: str, inputs: Mapping[str, Any], small: bool) -> Iterator[dict[str, Any]]:
    """Yield how far pruned calls are from the masked reference, beside how far the model is from itself."""
    dtype = str(model.dtype).removeprefix("torch.")
    adapter = adapter_for(model)
    with torch.no_grad():
        real = inputs["attention_mask"].bool()
        plain = model(**inputs).logits[real]
        model.set_attn_implementation("eager")
        eager = model(**inputs).logits[real]
        model.set_attn_implementation("sdpa")
    noise = float((plain - eager).abs().max())
    scale = float(plain.float().std())
    agree = float((plain.argmax(-1) == eager.argmax(-1)).float().mean())
    del plain, eager
    yield {
        "family": family,
        "dtype": dtype,
        "what": "unpruned, sdpa against eager",
        "difference": noise,
        "prompt": inputs["input_ids"].shape[1],
        "logit_std": scale,
        "argmax_agrees": agree,
    }
    for name, retention in methods(small):
        case, overlap = Case(adapter, inputs, vidsieve.load(name, retention=retention)), None
        if isinstance(case.compressor, LayerCompressor):
            # Eager attention rounds otherwise: compare what is done with a choice, and say how far choices agree.
            case, overlap = with_own_choice(case)
        difference, _ = CALLS["prefill logits"](case)
        _, equal = CALLS["8 greedy tokens"](case)
        yield {
            "family": family,
            "dtype": dtype,
            "what": f"{name} at {retention}, pruned against masked",
            "difference": difference,
            "logit_std": scale,
            "greedy_tokens_equal": equal,
            "choices_agree": overlap,
        }


def with_own_choice(case: Case) -> tuple[Case, float]:
    """Return a case whose reference keeps what the method kept, and the share that the reference would keep too."""
    with torch.no_grad(), case.attached() as session:
        case.adapter.model(**case.inputs, logits_to_keep=1)
    theirs = case.chosen()
    assert isinstance(theirs, LayeredSelections)
    (layer,) = theirs.stages  # FastV has one stage
    kept, shared = [], 0
    for trace, selection in zip(session.trace, theirs, strict=True):
        kept.append(Selection(torch.tensor(trace.indices, device=case.ids.device)))
        shared += len(set(trace.indices) & set(selection.indices.tolist()))
    ours = LayeredSelections(theirs.compressor, theirs.entering)
    ours.take(layer, kept)
    return replace(case, given=ours), shared / sum(trace.kept for trace in session.trace)


def timed(run: Callable[[], Any], device: str) -> tuple[dict[str, float], int]:
    """Return the seconds of `RUNS` runs after one to warm up, and the peak memory of a run in bytes."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(RUNS):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return spread(seconds), torch.cuda.max_memory_allocated() if device == "cuda" else 0


@torch.no_grad()
def speed(model: Any, family: str, inputs: Mapping[str, Any], device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Yield time to the first token and for 32 tokens, and memory, full and pruned, in one run."""
    batch = inputs["input_ids"].shape[0]
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    options = {"do_sample": False}

    def generate(tokens: int) -> Callable[[], Any]:
        return lambda: model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **options)

    def row(method: str, retention: float, **fields: Any) -> dict[str, Any]:
        first, peak = timed(generate(1), device)
        whole, _ = timed(generate(32), device)
        return {
            "family": family,
            "batch": batch,
            "method": method,
            "retention": retention,
            "prompt": inputs["input_ids"].shape[1],
            "first_token_s": first,
            "32_tokens_s": whole,
            "peak_bytes": peak,
            "peak_beyond_weights": peak - held,
            **fields,
        }

    full = row("full", 1.0)
    adapter = adapter_for(model)
    tower, _ = timed(lambda: adapter.encode(inputs), device)
    yield full | {"tower_s": tower}
    for name, retention in methods(small):
        with vidsieve.attach(model, vidsieve.load(name, retention=retention)) as session:
            found = row(name, retention)
        select = spread([trace.select_ms for trace in session.trace])
        for key in ("first_token_s", "32_tokens_s"):
            found[f"{key[:-2]}_speedup"] = full[key]["median"] / found[key]["median"]
        # What is left of the first token beside the tower, which every method needs.
        own = found["first_token_s"]["median"] - tower["median"]
        found["llm_speedup"] = (full["first_token_s"]["median"] - tower["median"]) / own
        if device == "cuda":
            found["memory_ratio"] = found["peak_beyond_weights"] / full["peak_beyond_weights"]
        yield found | {"select_ms_per_video": select}


@torch.no_grad()
def compiled(model: Any, family: str, inputs: Mapping[str, Any], device: str) -> Iterator[dict[str, Any]]:
    """Yield what compiling the language model changes for pruned prompts."""
    inner, method = adapter_for(model).language_model, vidsieve.load("divprune", retention=0.25)

    def run(tokens: int = STEPS) -> Tensor:
        with vidsieve.attach(model, method):
            made: Tensor = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return made[:, inputs["input_ids"].shape[1] :]

    plain = run()
    before, _ = timed(lambda: run(32), device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = "inductor" if device == "cuda" else "aot_eager"
    inner.forward = torch.compile(inner.forward, fullgraph=True, dynamic=True, backend=backend)
    try:
        start = time.perf_counter()
        made = run()
        synchronise(device)
        took = time.perf_counter() - start
        after, _ = timed(lambda: run(32), device)
    finally:
        del inner.forward
    stats = dict(torch._dynamo.utils.counters["stats"])
    adapter = adapter_for(model)
    chosen, _ = adapter.select(adapter.encode(inputs), method, torch.Generator().manual_seed(0))
    wanted = reference_greedy(adapter, inputs, chosen, 1)
    last = reference_logits(adapter, inputs, chosen)[:, -1].float().topk(2).values
    yield {
        "family": family,
        "backend": backend,
        "compile_s": took,
        "graphs": stats.get("unique_graphs"),
        "tokens_equal_uncompiled": float((made == plain).float().mean()),
        "first_token_equals_masked": bool((made[:, :1] == wanted).all()),
        "masked_gap_of_best_two": float((last[:, 0] - last[:, 1]).min()),
        "32_tokens_s": after,
        "32_tokens_uncompiled_s": before,
        "speedup": before["median"] / after["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--parts", default="tiny,float32,bfloat16,speed,compiled")
    parser.add_argument("--families", default=",".join(LARGE))
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU, to try the program")
    options = parser.parse_args()
    device = "cpu" if options.small else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --small tries the program on the CPU")
    parts, families = options.parts.split(","), options.families.split(",")
    result: dict[str, Any] = {"machine": machine(), "tolerance": TOLERANCE, "runs": RUNS, "failed": []}

    def collect(part: str, rows: Iterator[dict[str, Any]]) -> None:
        """Note each row as it comes, so that a part that breaks loses nothing."""
        result.setdefault(part, [])
        try:
            for found in rows:
                result[part].append(found)
                print(part, {k: v for k, v in found.items() if v is not None}, flush=True)
        except Exception as error:  # the other parts are worth their time still
            traceback.print_exc()
            result["failed"].append(f"{part}: {type(error).__name__}: {str(error)[:500]}")
        write_result(options.json, result)

    start = time.perf_counter()
    if "tiny" in parts:
        collect("tiny", tiny(device))
    for family in families:
        for name in ("float32", "bfloat16"):
            if name not in parts and not (name == "bfloat16" and {"speed", "compiled"} & set(parts)):
                continue
            model = build(family, getattr(torch, name), device, options.small)
            print(f"{family} {name} at {time.perf_counter() - start:.0f} s", flush=True)
            if name in parts:
                inputs = prompts(model, family, 16, [40], device, options.small)
                collect(name, exactness(model, family, inputs, options.small))
            if name == "bfloat16" and "speed" in parts:
                for words in ([40], [40, 12, 60, 8]):
                    inputs = prompts(model, family, 32, words, device, options.small)
                    collect("speed", speed(model, family, inputs, device, options.small))
            if name == "bfloat16" and "compiled" in parts:
                inputs = prompts(model, family, 32, [40], device, options.small)
                collect("compiled", compiled(model, family, inputs, device))
            inputs = {}
            del model
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    result["seconds"] = round(time.perf_counter() - start)
    write_result(options.json, result)


if __name__ == "__main__":
    main()
