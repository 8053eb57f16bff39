"""Predict memory, speed and hours of a training from a model's configuration; no weights are read, nothing is run."""

from __future__ import annotations

import math
from typing import Any

import torch

from vidsieve.errors import TrainingError
from vidsieve.evaluation.flops import prefill_flops
from vidsieve.loading import is_testbed
from vidsieve.serving.plan import Gpu, encoded_video, read_model
from vidsieve.testbed.world import FRAMES
from vidsieve.training.recipes import new_policy
from vidsieve.training.rollouts import CPU_SHARE, CPU_TOKENS, GPU_TOKENS, Footprint
from vidsieve.training.sampling import tokens_per_draw
from vidsieve.training.settings import CaCoVIDConfig, ScoreConfig, SieveConfig, config_of

UNKNOWN_RATE = 0.5
"""Fraction kept by a policy that chooses its own rate, as at its start; it falls in training."""


def kept_by_rollouts(config: CaCoVIDConfig | ScoreConfig, per_frame: int) -> float:
    """Return the mean fraction of the tokens that a rollout keeps."""
    if config.rate_high > config.rate_low:  # log-uniform between them
        return (config.rate_high - config.rate_low) / math.log(config.rate_high / config.rate_low)
    if config.rate_high:
        return config.rate_high
    if isinstance(config, ScoreConfig):
        return UNKNOWN_RATE
    return tokens_per_draw(config.ratio, per_frame) / per_frame


def dry_run(
    method: str,
    model: str,
    settings: dict[str, Any],
    gpu: Gpu,
    *,
    variant: str = "ours",
    size: tuple[int, int] = (360, 640),
    text_tokens: int = 64,
    caption_tokens: int = 64,
) -> dict[str, Any]:
    """Return what a training would take, as plain values.

    Parameters
    ----------
    method, settings, variant : as `train_policy` has them
    model : str
        As `read_model` has it.
    gpu : Gpu
        Where it would run; `Gpu.here` for this machine.
    size : (int, int)
        Height and width of the frames in pixels.
    text_tokens, caption_tokens : int
        Tokens of a prompt that are not the video's, and of a caption.

    Returns
    -------
    dict
        ``memory_bytes`` with its parts, ``rollouts_per_s``, ``prompt_s`` with its parts, ``hours`` of all steps, and
        the ``assumptions`` as text.

    Raises
    ------
    UnknownNameError, TrainingError, ModelError, UnsupportedModelError
    """
    config = config_of(method, variant, settings)
    if config.objective in ("straight_through", "soft_topk"):
        raise TrainingError(
            f"objective {config.objective!r} differentiates through the LLM, which is not predicted: leave --dry-run "
            "out, and see what --steps 2 takes"
        )
    adapter = read_model(model)
    usual = torch.float32 if gpu.cpu or is_testbed(model) else torch.bfloat16
    filed = usual if is_testbed(model) else adapter.model.config.dtype or usual  # a size by name has no files
    adapter.model.to(torch.bfloat16 if config.precision == "bf16" else filed)
    width = adapter.model.dtype.itemsize
    text, vision = adapter.model.config.get_text_config(), adapter.model.config.vision_config
    with torch.device("meta"):
        policy = new_policy(adapter, config, variant, model, blank=True)
    frames = min(config.frames, FRAMES) if is_testbed(model) else config.frames
    grid, newlines, patches, encoder_flops = encoded_video(adapter, frames, size)
    tokens, kept = grid.num_tokens, kept_by_rollouts(config, grid.per_frame)
    captioned = config.captioned if isinstance(config, SieveConfig) else isinstance(config, ScoreConfig)
    caption = caption_tokens if captioned else 0
    around = min(newlines, tokens) + text_tokens + caption
    length, whole, positions = round(kept * tokens) + around, tokens + around, caption + 1

    if isinstance(config, CaCoVIDConfig):
        agreeing = config.answered and config.reward == "agreement" and config.objective != "distil"
        iterations, complete = config.iterations, float(agreeing)
    else:
        iterations, complete = 1, float(config.advantage == "split")
    groups = config.masks
    if config.objective == "distil" or (isinstance(config, SieveConfig) and config.teaches):
        read_layers = {
            "oracle": 0,
            "first_look": adapter.first_full_layer + 1,
            "attention": len(adapter.decoder_layers),
        }
        complete += read_layers[config.teacher] / len(adapter.decoder_layers)

    llm = sum(p.numel() for p in adapter.language_model.parameters())
    parameters = sum(p.numel() for p in adapter.model.parameters())
    learned = sum(p.numel() for p in policy.parameters())
    weights, optimised = width * parameters, 16 * learned  # float32 weights, gradients and two moments
    pack, left = Footprint.of(adapter.model).rollout(length, positions), 1e9 * gpu.memory - weights - optimised
    if left < pack:
        half = "--precision bf16, " if width > 2 else ""
        raise TrainingError(
            f"{model} and the policy take {(weights + optimised) / 1e9:.1f} of the {gpu.memory:.1f} GB of {gpu.name}, "
            f"and no rollout fits beside them: take {half}more memory, or a smaller model"
        )
    most, free = (CPU_TOKENS, min(left, 1e9 * gpu.memory / CPU_SHARE)) if gpu.cpu else (GPU_TOKENS, left)
    rows = max(1, math.floor(min(groups, most // length, free / pack)))
    head = 2.0 * text.hidden_size * text.vocab_size * caption  # the last position is in `prefill_flops`
    read = width * llm

    def prefills(count: float, at: int, packs: float) -> float:
        return gpu.seconds(count * (prefill_flops(text, at) + head), packs * read) if count else 0.0

    layers = [p for name, p in policy.named_parameters() if name.startswith("layers.")]
    attended = 4.0 * (tokens + text_tokens) ** 2 * text.hidden_size * bool(layers)  # of one decoder layer
    # Forward and backward; the first products need no gradient of their input.
    policy_flops = 2.5 * (2.0 * learned * (tokens + text_tokens * bool(layers)) + attended)
    parts = {
        "encoder_s": gpu.seconds(encoder_flops, weights - read),
        "all_tokens_s": prefills(complete, whole, complete),
        "rollouts_s": iterations * prefills(groups, length, -(-groups // rows)),
        "policy_s": iterations * gpu.seconds(policy_flops, optimised),
    }
    prompt_s = sum(parts.values())
    memory = {
        "weights_bytes": weights,
        "policy_bytes": optimised,
        "activations_bytes": max(
            rows * pack if groups else 0,
            width * patches * (8 * vision.hidden_size + 3 * vision.intermediate_size),
        ),
    }
    prompts = config.steps * config.prompts_per_step
    return {
        "method": method,
        "variant": variant,
        "model": model,
        "video_tokens": tokens,
        "rollout_tokens": length,
        "rollouts_per_prompt": groups * iterations,
        "rollouts_per_prefill": rows,
        "policy_parameters": learned,
        "memory_bytes": sum(memory.values()),
        **memory,
        **parts,
        "prompt_s": prompt_s,
        "rollouts_per_s": groups * iterations / prompt_s,
        "prompts": prompts,
        "hours": prompts * prompt_s / 3600,
        "assumptions": [
            f"nothing was run; {gpu.name}: {gpu.tflops * gpu.efficiency:.3g} TFLOP/s and "
            f"{gpu.bandwidth * gpu.bandwidth_share:.3g} GB/s are reached, of {gpu.memory:.3g} GB; one process",
            f"{frames} frames of {size[0]}×{size[1]} pixels are {grid.frames}×{grid.height}×{grid.width} video "
            f"tokens; {text_tokens} tokens of text" + (f", {caption_tokens} of caption" if caption else ""),
            f"rollouts keep {kept:.3g} of the tokens" + (" at the start" if kept == UNKNOWN_RATE else ""),
            "reading videos, evaluations on held-out prompts, norms, softmax and sampling take no time; memory is that "
            "of weights, optimiser and the larger of one pack of rollouts and one video's encoding",
        ],
    }
