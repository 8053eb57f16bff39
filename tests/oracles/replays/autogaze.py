"""Cases of autogaze.npz: what is gazed at, its likelihood, tiles of larger frames, and the losses of training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors._gazing import GazeShape, Llama3Rope
from vidsieve.compressors.autogaze import AutoGazePolicy
from vidsieve.training.losses import gaze_loss, gaze_prediction_loss


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/gazing_pos" in keys:
            yield _gaze(archive, case)
        elif f"{case}/log_probs" in keys:
            yield _losses(archive, case)
        else:
            yield Case("autogaze", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def policy(archive: Archive, case: str, variant: str = "official") -> AutoGazePolicy:
    """Return the policy of a recorded case."""
    width, layers, heads, inner, at_once = (int(n) for n in archive[f"{case}/cfg"])
    eps, theta = float(archive[f"{case}/rms_eps"]), float(archive[f"{case}/rope_theta"])
    shape = GazeShape(
        tuple(archive[f"{case}/scales"].tolist()),
        int(archive[f"{case}/tokens_per_frame"]),
        int(archive[f"{case}/img"]),
        int(archive[f"{case}/kernel"]),
        BlockShape(width, heads, heads, width // heads, inner, eps, theta, qkv_bias=False),
        layers,
        at_once,
        rope=Llama3Rope(),
    )
    made, prefix = AutoGazePolicy(shape, variant), f"{case}/w/"
    weights = {k.removeprefix(prefix): torch.from_numpy(archive[k]) for k in archive if k.startswith(prefix)}
    made.load_state_dict(weights)
    return made.eval()


def _gaze(archive: Archive, case: str) -> Case:
    network, video = policy(archive, case), torch.from_numpy(archive[f"{case}/video"])
    ratio, requirement = float(archive[f"{case}/gazing_ratio"]), float(archive[f"{case}/task_loss_requirement"])
    tiled = f"{case}/target_scales" in archive
    gaze = network.gaze(
        video,
        ratio if ratio > 0 else 1.0,
        None if requirement != requirement else requirement,
        scales=archive[f"{case}/target_scales"].tolist() if tiled else None,
        patch=int(archive[f"{case}/target_patch_size"]) if tiled else 16,
        clip=len(video),
    )
    padding = torch.from_numpy(archive[f"{case}/padded"])
    compared = {
        "counts": same_indices(gaze.counts, archive[f"{case}/num_each_frame"]),
        "padding": same_indices(gaze.padding, padding),
        "patches": same_indices(gaze.patches[~gaze.padding], archive[f"{case}/gazing_pos"][~padding.numpy()]),
    }
    for scale, mask in enumerate(gaze.masks):
        compared[f"mask {scale}"] = same_indices(mask, archive[f"{case}/mask{scale}"])
    if not tiled:
        first = torch.arange(len(video)).repeat_interleave(gaze.counts) * network.shape.tokens
        frames = (gaze.patches - first)[None].split(gaze.counts.tolist(), 1)
        with torch.no_grad():
            found = network.gazing_model.likelihood(video[None], frames)
        for key, ours in zip(("probs", "task_loss_prediction"), found, strict=True):
            compared[key] = gap(ours[0][~padding], archive[f"{case}/{key}"][~padding.numpy()])
    return judged("autogaze", case, compared)


def _losses(archive: Archive, case: str) -> Case:
    def of(key: str) -> Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    log_probs, predicted = of("log_probs").requires_grad_(), of("task_loss_prediction").requires_grad_()
    size, discount = int(of("group_size")), float(of("discount"))
    loss = gaze_loss(log_probs, of("padded"), of("reward"), of("traj_len").long(), size, discount)
    if int(of("optimize_task_loss_prediction")):
        loss = loss + gaze_prediction_loss(predicted, of("task_losses"), of("task_losses_mask"), of("padded"))
    grads = torch.autograd.grad(loss.sum(), (log_probs, predicted), allow_unused=True, materialize_grads=True)
    compared = {
        "loss": gap(loss.detach(), of("loss")),
        "gradient of log-probabilities": gap(grads[0], of("grad_log_probs")),
        "gradient of predictions": gap(grads[1], of("grad_prediction")),
    }
    return judged("autogaze", case, compared)
