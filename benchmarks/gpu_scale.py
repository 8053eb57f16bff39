"""How long selecting, prefills, training steps and the way to the first token take at the papers' sizes, on one GPU.

LLaVA-OneVision-7B and Qwen2.5-VL-7B have random weights, bfloat16, so that times mean what they say and answers
nothing. Each part's rows are written as they come. ``--small`` runs the same on tiny models on the CPU.

``ceilings``     what the card reaches: a bfloat16 product, a copy, scaled-dot-product attention
``select``       CaCoVID's and SCORE's policies on 6,272 and 42,560 tokens of width 3584, beside the time that their
                 products alone would take at the reached rate
``first_token``  from decoded frames to the first token, stage by stage, all tokens and 25 and 10 % by SCORE
``prefill``      Qwen2.5-VL-7B at 128 frames of 38 × 70 patches (42,560 tokens), all tokens and 10 % by SCORE
``steps``        a training step of CaCoVID (32 × 196 tokens, r = .02, 32 rollouts) and of SCORE (128 frames, K = 16)
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpu import build, prompts
from vidsieve.adapters.encoded import on_device
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.transformers_api import synchronise
from vidsieve.answering import Clock, generated
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVID, CaCoVIDPolicy
from vidsieve.compressors.score import Score, ScorePolicy
from vidsieve.io.machine import machine, spread, write_result
from vidsieve.testing.checks import make_video
from vidsieve.training.cacovid import CaCoVIDTrainer
from vidsieve.training.data.samples import Caption, Choice
from vidsieve.training.score import ScoreTrainer
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig, ScoreConfig
from vidsieve.types import TokenGrid, VideoTokens

QWEN2_7B = BlockShape(3584, 28, 4, 128, 18944, rope_theta=1e6)
TINY = BlockShape(64, 4, 2, 16, 128)


def timed(work: Callable[[], Any], device: str, runs: int, warm: int = 2) -> tuple[dict[str, float], int]:
    """Return milliseconds of `runs` runs, each synchronised, and the bytes that a run holds beyond what was there."""
    for _ in range(warm):
        work()
    held = 0
    if device == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    spent = []
    for _ in range(runs):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        spent.append(1e3 * (time.perf_counter() - start))
    return spread(spent), torch.cuda.max_memory_allocated() - held if device == "cuda" else 0


# -- what the card reaches --------------------------------------------------------------------------------------------


def ceilings(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Yield teraflops of a product and of attention in bfloat16, and terabytes a second of a copy."""
    size = 256 if small else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms, _ = timed(lambda: a @ b, device, 10)
    yield {"what": f"product {size}³, bfloat16", "ms": ms, "tflops": 2 * size**3 / ms["median"] / 1e9}
    source = torch.randn(2**20 if small else 2**30, device=device)
    target = torch.empty_like(source)
    ms, _ = timed(lambda: target.copy_(source), device, 10)
    yield {"what": "copy, bytes read and written", "ms": ms, "tb_per_s": 8 * source.numel() / ms["median"] / 1e9}
    length = 512 if small else 6272
    q = torch.randn(1, 28, length, 128, device=device, dtype=torch.bfloat16)
    ms, _ = timed(lambda: F.scaled_dot_product_attention(q, q, q), device, 10)
    yield {
        "what": f"attention, 28 heads of 128, {length} tokens",
        "ms": ms,
        "tflops": 4 * 28 * 128 * length**2 / ms["median"] / 1e9,
    }


# -- selecting --------------------------------------------------------------------------------------------------------


def least_flops(policy: CaCoVIDPolicy | ScorePolicy, video: VideoTokens) -> float:
    """Return the operations of a policy's large products, which it cannot do without."""
    n, width = video.num_tokens, video.embeds.shape[1]
    if isinstance(policy, ScorePolicy):
        return 2 * n * 2 * width * policy.out.in_features
    if policy.body == "question":
        s = policy.scorer
        return (
            2
            * n
            * width
            * (
                s.key.out_features
                + s.content.out_features
                + s.change.out_features
                + (s.first_look.self_attn.k_proj.out_features if s.first_look is not None else 0)
            )
        )
    shape, length = policy.layers[0].shape, video.prompt.embeds.shape[0]
    projections = sum(p.numel() for name, p in policy.layers.named_parameters() if name.endswith("proj.weight"))
    heads = sum(p.numel() for name, p in policy.token_compress.named_parameters() if name.endswith("weight"))
    return 2 * length * projections + 4 * length**2 * shape.num_heads * shape.head_dim + 2 * n * heads


@torch.no_grad()
def select(device: str, small: bool, rate: float) -> Iterator[dict[str, Any]]:
    """Yield what each policy's scoring and whole selection take, beside its products at `rate` teraflops."""
    shape, grids = (TINY, [TokenGrid(4, 4, 4)]) if small else (QWEN2_7B, [TokenGrid(32, 14, 14), TokenGrid(64, 19, 35)])
    for grid in grids:
        for dtype in (torch.bfloat16, torch.float32):
            video = on(make_video(grid, shape.hidden_size, dtype=dtype), device)
            for name, make in {
                "cacovid paper, layer": lambda: CaCoVIDPolicy.of_shape(shape, "none", variant="paper"),
                "cacovid paper, attention only": lambda: CaCoVIDPolicy.of_shape(
                    shape, "none", variant="paper", body="attention"
                ),
                "cacovid ours": lambda: CaCoVIDPolicy.of_shape(shape, "none"),
                "score paper, hidden 512": lambda: ScorePolicy.start(shape.hidden_size, "none", variant="paper"),
                "score ours, hidden 256": lambda: ScorePolicy.start(shape.hidden_size, "none", hidden=256),
            }.items():
                policy = make().eval()
                kind = Score if isinstance(policy, ScorePolicy) else CaCoVID
                method = kind(policy=policy, variant=policy.config.variant, retention=0.1)

                def scores(policy: Any = policy, video: VideoTokens = video) -> Any:
                    with policy.serving(video.embeds):
                        return policy(video)

                limit = least_flops(policy, video) / rate / 1e9
                row = {"policy": name, "dtype": str(dtype)[6:], "tokens": grid.num_tokens, "limit_ms": limit}
                try:
                    scoring, extra = timed(scores, device, 20)
                    whole, _ = timed(lambda m=method, v=video: m.compress(v), device, 20)
                except torch.cuda.OutOfMemoryError as error:
                    yield row | {"out_of_memory": str(error).partition(". GPU")[0]}
                    continue
                yield row | {
                    "scoring_ms": scoring,
                    "selection_ms": whole,
                    "times_limit": scoring["median"] / limit,
                    "extra_MiB": extra / 2**20,
                }
                del policy, method


def on(video: VideoTokens, device: str) -> VideoTokens:
    """Return a video and its prompt on a device."""
    from dataclasses import replace

    p = video.prompt
    prompt = replace(
        p,
        embeds=p.embeds.to(device),
        positions=p.positions.to(device),
        video_mask=p.video_mask.to(device),
        question_mask=p.question_mask.to(device),
    )
    return replace(
        video, embeds=video.embeds.to(device), positions=video.positions.to(device), prompt=prompt, encoder=None
    )


# -- the model --------------------------------------------------------------------------------------------------------


def score_policy(model: Any, hidden: int = 512) -> Score:
    """Return SCORE with random weights for a model."""
    width = model.config.get_text_config().hidden_size
    return Score(policy=ScorePolicy.start(width, adapter_for(model).family, hidden=hidden).eval().to(model.device))


@contextmanager
def on_clock(clock: Clock, modules: dict[str, list[Any]], device: str) -> Iterator[None]:
    """Put what modules take on the clock, by stage."""
    open_parts: dict[str, list[Any]] = {}
    handles = []
    for stage, of_stage in modules.items():
        for module in of_stage:

            def begin(*_: Any, stage: str = stage) -> None:
                part = clock.part(stage, device)
                part.__enter__()
                open_parts.setdefault(stage, []).append(part)

            def end(*_: Any, stage: str = stage) -> None:
                open_parts[stage].pop().__exit__(None, None, None)

            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stages_of(model: Any, family: str) -> dict[str, list[Any]]:
    """Return the modules of the vision encoder by stage."""
    if family == "llava_onevision":
        tower = model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        return {
            "tower: embed": [tower.embeddings],
            "tower: blocks": list(tower.encoder.layers),
            "projector": [model.model.multi_modal_projector],
        }
    tower = model.model.visual
    full = set(tower.fullatt_block_indexes)
    return {
        "tower: embed": [tower.patch_embed],
        "tower: blocks, windows": [b for i, b in enumerate(tower.blocks) if i not in full],
        "tower: blocks, full": [b for i, b in enumerate(tower.blocks) if i in full],
        "projector": [tower.merger],
    }


def preprocessed(family: str, frames: np.ndarray, device: str) -> dict[str, Any]:
    """Return what the family's own video processor makes of frames (T, H, W, 3) uint8."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if family == "llava_onevision":
        from transformers import LlavaOnevisionVideoProcessor as Processor
    else:
        from transformers import Qwen2VLVideoProcessor as Processor
    return dict(Processor()(videos=[video], return_tensors="pt", device=device, do_sample_frames=False))


@torch.no_grad()
def first_token(model: Any, family: str, device: str, small: bool, runs: int) -> Iterator[dict[str, Any]]:
    """Yield milliseconds of each stage from decoded frames to the first token; median of runs."""
    adapter, score = adapter_for(model), score_policy(model)
    draw = np.random.default_rng(0)
    for count in (4,) if small else (32, 64):
        frames = draw.integers(0, 256, (count, 360, 640, 3), dtype=np.uint8)
        inputs = prompts(model, family, count, [40], device, small)
        if not small and family == "qwen2_5_vl":  # words and grid for the patches that its processor makes
            grid = tuple(preprocessed(family, frames, "cpu")["video_grid_thw"][0].tolist())
            inputs = prompts(model, family, 2 * grid[0], [40], device, small, patches=grid[1:])
        for where in ("cpu",) if small else ("cpu", "cuda"):
            for retention in (1.0, 0.25, 0.1):
                method = None if retention == 1.0 else score.with_retention(retention)
                rows, inner = [], []
                for _ in range(runs + 1):
                    clock, stages = Clock(), Clock()
                    with clock.part("preprocess", device):
                        if not small:
                            made = on_device(preprocessed(family, frames, where), torch.device(device))
                            made["pixel_values_videos"] = made["pixel_values_videos"].to(model.dtype)
                            inputs = inputs | {"pixel_values_videos": made["pixel_values_videos"]}
                    with clock.part("encode", device):
                        encoded = adapter.encode(inputs)
                    with on_clock(stages, stages_of(model, family), device):
                        adapter.encode(inputs)
                    result = generated(adapter, encoded, method, clock, tokens=1)
                    del clock.ms["generate"]
                    rows.append(dict(clock.ms))
                    inner.append(dict(stages.ms))
                tokens = encoded.videos[0].features.grid.num_tokens
                parts = {part: median(row[part] for row in rows[1:]) for part in rows[0]}
                yield {
                    "family": family,
                    "frames": count,
                    "preprocess_on": where,
                    "retention": retention,
                    "video_tokens": tokens,
                    "prompt": result.plan.inputs["input_ids"].shape[1],
                    "ms": parts,
                    "encoder_stages_ms": {p: median(row[p] for row in inner[1:]) for p in inner[0]},
                    "first_token_ms": spread([sum(row.values()) for row in rows[1:]]),
                }


@torch.no_grad()
def prefill(model: Any, family: str, device: str, small: bool, runs: int) -> Iterator[dict[str, Any]]:
    """Yield the prefill of the papers' longest prompt with all tokens and with a tenth, selecting included."""
    adapter, score = adapter_for(model), score_policy(model)
    frames = 4 if small else 128
    inputs = prompts(model, family, frames, [40], device, small, patches=(38, 70))
    encoded = adapter.encode(inputs)
    encoding, _ = timed(lambda: adapter.encode(inputs), device, runs, warm=0)
    full = None
    for retention in (1.0, 0.25, 0.1):
        method = None if retention == 1.0 else score.with_retention(retention)
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows = []
        for _ in range(runs + 1):
            clock = Clock()
            made = generated(adapter, encoded, method, clock, tokens=1)
            rows.append(clock.ms["select"] + clock.ms["prefill"])
            chosen = clock.ms["select"]
        full = full or median(rows[1:])
        yield {
            "family": family,
            "frames": frames,
            "retention": retention,
            "encode_ms": encoding,
            "prompt": made.plan.inputs["input_ids"].shape[1],
            "select_ms": chosen,
            "select_and_prefill_ms": spread(rows[1:]),
            "times_faster": full / median(rows[1:]),
            "peak_GiB": (torch.cuda.max_memory_allocated() - held) / 2**30 if device == "cuda" else 0,
        }


def steps(model: Any, family: str, device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Yield seconds of a training step at the papers' settings, on 8 prompts for CaCoVID and on 1 and 8 for SCORE."""
    adapter = adapter_for(model)
    model.requires_grad_(False)
    if family == "llava_onevision":
        sample_inputs = prompts(model, family, 4 if small else 32, [60], device, small)
        options = torch.tensor([1, 2, 3, 4])
        for variant, body in (("paper", "layer"), ("ours", None)):
            settings = SETTINGS["cacovid", variant] | {
                "steps": 3,
                "precision": "bf16",
                "log_every": 1,
                "eval_prompts": 0,
            }
            if variant == "paper":
                settings |= {"iterations": 5, "body_lr": 1e-7, "head_lr": 1e-6}
            state = adapter.layer_state(0)
            policy = CaCoVIDPolicy.of_shape(
                state.shape, adapter.family, variant=variant, layers=[state.weights], body=body
            ).to(device)
            policy.float()
            with tempfile.TemporaryDirectory() as folder:
                trainer = CaCoVIDTrainer(
                    adapter,
                    policy,
                    CaCoVIDConfig(**settings),
                    lambda i: Choice(sample_inputs, options, 0),
                    Path(folder) / "run",
                )
                yield {"method": f"cacovid {variant}", "family": family} | clocked(trainer, device)
            del trainer, policy
            free(device)
    else:
        inputs = prompts(model, family, 4 if small else 128, [60], device, small, patches=(38, 70))
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :-60] = -100
        settings = SETTINGS["score", "paper"] | {
            "steps": 3,
            "precision": "bf16",
            "log_every": 1,
            "prompts_per_step": 1,
            "eval_prompts": 0,
        }
        width = model.config.get_text_config().hidden_size
        policy = ScorePolicy.start(width, adapter.family, variant="paper").to(device)
        with tempfile.TemporaryDirectory() as folder:
            trainer = ScoreTrainer(
                adapter, policy, ScoreConfig(**settings), lambda i: Caption(inputs), Path(folder) / "r"
            )
            yield {"method": "score paper, one video a step", "family": family} | clocked(trainer, device)


def clocked(trainer: Any, device: str) -> dict[str, Any]:
    """Return the seconds of each step of a short run, the first one apart, and its peak memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [time.perf_counter()]

    def tick(*_: Any) -> None:
        synchronise(device)
        times.append(time.perf_counter())

    trainer.tick = tick
    trainer.fit()
    seconds = [after - before for before, after in pairwise(times)]
    prompts_a_step, rollouts = trainer.config.prompts_per_step, trainer.rollouts * trainer.iterations
    return {
        "prompts_per_step": prompts_a_step,
        "rollouts_per_prompt": rollouts,
        "first_step_s": seconds[0],
        "step_s": spread(seconds[1:]),
        "rollouts_per_s": prompts_a_step * rollouts / median(seconds[1:]),
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0,
        "packing": trainer.packing.record(),
    }


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu_scale.json"))
    parser.add_argument("--parts", default="ceilings,select,prefill,first_token,steps")
    parser.add_argument("--families", default="qwen2_5_vl,llava_onevision")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU, to try the program")
    options = parser.parse_args()
    device = "cpu" if options.small else "cuda"
    parts = options.parts.split(",")
    result: dict[str, Any] = {"machine": machine(), "failed": []}
    began = time.perf_counter()

    def collect(part: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """Note each row as it comes, so that a part that breaks loses nothing."""
        noted = result.setdefault(part, [])
        try:
            for found in rows:
                noted.append(found)
                print(f"{time.perf_counter() - began:.0f} s", part, found, flush=True)
                write_result(options.json, result)
        except Exception as error:  # the other parts are worth their time still
            traceback.print_exc()
            result["failed"].append(f"{part}: {type(error).__name__}: {str(error)[:500]}")
            write_result(options.json, result)
        free(device)
        return noted

    reached = collect("ceilings", ceilings(device, options.small))
    if "select" in parts:
        collect("select", select(device, options.small, reached[0]["tflops"]))
    for family in options.families.split(","):
        if not {"prefill", "first_token", "steps"} & set(parts):
            break
        model = build(family, torch.bfloat16 if not options.small else torch.float32, device, options.small)
        if "prefill" in parts and family == "qwen2_5_vl":
            collect("prefill", prefill(model, family, device, options.small, options.runs))
        if "first_token" in parts:
            collect("first_token", first_token(model, family, device, options.small, options.runs))
        if "steps" in parts:
            collect("steps", steps(model, family, device, options.small))
        del model
        free(device)
    result["seconds"] = round(time.perf_counter() - began)
    write_result(options.json, result)


if __name__ == "__main__":
    main()
