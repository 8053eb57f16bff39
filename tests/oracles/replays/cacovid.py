"""Cases of cacovid.npz: inference selection, probability clipping, sampling, losses and the policy network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy, official_selection
from vidsieve.training import release_sampling as official
from vidsieve.training.advantages import official_advantage
from vidsieve.training.losses import action_log_probs, cpo_loss
from vidsieve.types import Prompt, TokenGrid, VideoTokens

_SHARED = ("policy/w", "policy/cfg", "policy/rope_theta", "policy/rms_eps")


def cases(archive: Archive) -> Iterator[Case]:
    """Yield ``inf/*``, ``clip/*``, ``samp/*``, ``loss/*`` and ``policy/*``."""
    kinds = {"inf": _inference, "clip": _clip, "samp": _sampling, "loss": _loss, "policy": _policy}
    for case in groups(archive, 2):
        if case in _SHARED:
            continue
        run = kinds.get(case.split("/")[0])
        if run is None:
            note = "a mode that the release cannot reach" if case.startswith("legacy") else "unknown kind of case"
            yield Case("cacovid", case, "-", float("nan"), "no such method yet", note)
        else:
            yield run(archive, case)


def _tensor(archive: Archive, key: str) -> Tensor:
    return torch.from_numpy(np.array(archive[key]))


def _difference(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def _grid(archive: Archive, case: str) -> TokenGrid:
    frames, height, width = (int(v) for v in archive[f"{case}/thw"])
    return TokenGrid(frames, height, width)


def _inference(archive: Archive, case: str) -> Case:
    tokens, frames = (_difference(_tensor(archive, f"{case}/{k}_logits")) for k in ("token", "frame"))
    ratio, share, cap = (float(archive[f"{case}/{k}"]) for k in ("topk", "imp_ratio", "max_ratio"))
    kept, chosen, counts = official_selection(tokens, frames, _grid(archive, case), ratio, share, cap)
    stable = archive.get(f"{case}/selected_stable")
    wanted = archive[f"{case}/selected"] if stable is None else stable
    unstable = stable is not None and same_indices(stable, archive[f"{case}/selected"]) != 0
    compared = {
        "kept": same_indices(kept, wanted),
        "per frame": same_indices(counts, archive[f"{case}/contrib_per_frame"]),
        "filled": float(abs(len(kept) - len(chosen) - int(archive[f"{case}/n_fill"]))),
    }
    if not unstable:
        compared["kept by score"] = same_indices(chosen, archive[f"{case}/selected_contrib"])
    return judged("cacovid", case, compared, "unstable ties: the stable variant compared" if unstable else "")


def _clip(archive: Archive, case: str) -> Case:
    p = _tensor(archive, f"{case}/p")
    if f"{case}/G" in archive:
        ours = official.clip_max_probability(p.repeat(int(archive[f"{case}/G"]), 1), 3 / p.shape[0])
    else:
        ours = official.clip_max_probability(p, float(archive[f"{case}/max_prob"]))
    return judged("cacovid", case, {"probabilities": gap(ours, archive[f"{case}/out"])}, tolerance=1e-6)


def _sampling(archive: Archive, case: str) -> Case:
    grid, ratio = _grid(archive, case), float(archive[f"{case}/rate"])
    scores, frame_scores = (_difference(_tensor(archive, f"{case}/{k}_logits")) for k in ("token", "frame"))
    embeds = _tensor(archive, f"{case}/video_embeds")
    probability = scores.reshape(grid.frames, grid.per_frame).softmax(1)
    parts = official.group_count(ratio, float(archive[f"{case}/group_size"]))
    members = official.group_of_tokens(probability, parts)
    mass = official.group_probability(probability, members, parts, float(archive[f"{case}/max_group_prob"]))
    drawn = _tensor(archive, f"{case}/group_drawn").long()
    inside = _tensor(archive, f"{case}/elem_prob")
    ours = torch.stack(
        [official.member_probability(probability[t], members[t], drawn[t], parts) for t in range(inside.shape[0])]
    )
    masks = np.unpackbits(archive[f"{case}/token_sample"], axis=-1)[:, : grid.num_tokens]
    seeded = torch.Generator().manual_seed(int(archive[f"{case}/seed"]))
    drawn_masks = official.token_masks(scores, grid, ratio, masks.shape[0], seeded)
    frames = _tensor(archive, f"{case}/frame_compress_sample").bool()
    noise = _tensor(archive, f"{case}/frame_noise")
    by_frames = np.unpackbits(archive[f"{case}/frame_sample"], axis=-1)[:, : grid.num_tokens]
    frame_masks = torch.stack(
        [official.frame_rollout_mask(embeds, grid, ratio, frames[i], noise[i]) for i in range(len(frames))]
    )
    content = official.content_mask(embeds, grid, ratio, _tensor(archive, f"{case}/content_noise").flatten())
    silent = official.content_mask(embeds, grid, ratio, torch.zeros(grid.num_tokens))
    compared = {
        "sub-spaces": float(abs(parts - int(archive[f"{case}/num_group"]))),
        "sub-space probabilities": gap(mass, archive[f"{case}/group_prob"]),
        "token probabilities": gap(ours, inside),
        "token masks from the seed": gap(drawn_masks, masks),
        "frame probabilities": gap(
            official.frame_probability(frame_scores, len(frames)), archive[f"{case}/frame_prob_fed"]
        ),
        "frame masks": gap(frame_masks, by_frames),
        "content mask": same_indices(content.nonzero(), np.sort(archive[f"{case}/content_sample"])),
        "content mask without noise": same_indices(silent.nonzero(), np.sort(archive[f"{case}/content_sample_noise0"])),
    }
    return judged("cacovid", case, compared, tolerance=1e-6)


def _loss(archive: Archive, case: str) -> Case:
    weight = float(archive[f"{case}/kl_weight"])
    memory: dict[str, list[Tensor]] = {"token_mask": [], "frame_mask": [], "token_reward": [], "frame_reward": []}
    first: dict[str, Tensor] = {}
    worst = dict.fromkeys(("loss", "token loss", "frame loss", "advantages", "gradients"), 0.0)
    for i in range(int(archive[f"{case}/iters"])):
        at = f"{case}/it{i}"
        for name, kept in memory.items():
            kept.append(_tensor(archive, f"{at}/new_{name}"))
        total = torch.zeros(())
        for kind in ("token", "frame"):
            logits = _tensor(archive, f"{at}/{kind}_logits").requires_grad_()
            first.setdefault(kind, logits.detach())
            masks, rewards = torch.cat(memory[f"{kind}_mask"]).bool(), torch.cat(memory[f"{kind}_reward"])
            advantage = official_advantage(rewards)
            loss = cpo_loss(
                logits,
                action_log_probs(first[kind], masks),
                masks,
                advantage,
                balanced=kind == "token",
                kl_weight=weight,
            )
            (gradient,) = torch.autograd.grad(loss, logits)
            total = total + loss.detach()
            worst[f"{kind} loss"] = max(worst[f"{kind} loss"], gap(loss.detach(), archive[f"{at}/{kind}_loss"]))
            worst["advantages"] = max(worst["advantages"], gap(advantage, archive[f"{at}/adv_{kind}"]))
            worst["gradients"] = max(worst["gradients"], gap(gradient, archive[f"{at}/grad_{kind}_logits"]))
        worst["loss"] = max(worst["loss"], gap(total, archive[f"{at}/loss"]))
    return judged("cacovid", case, worst, tolerance=1e-5)


def _policy(archive: Archive, case: str) -> Case:
    hidden, heads, kv_heads, inner = (int(v) for v in archive["policy/cfg"])
    shape = BlockShape(
        hidden,
        heads,
        kv_heads,
        hidden // heads,
        inner,
        float(archive["policy/rms_eps"]),
        float(archive["policy/rope_theta"]),
    )
    prefix = "policy/w/"
    weights = {k[len(prefix) :]: _tensor(archive, k) for k in archive if k.startswith(prefix)}
    embeds, mask = _tensor(archive, f"{case}/inputs_embeds"), _tensor(archive, f"{case}/video_mask").bool()
    grid, positions = _grid(archive, case), torch.arange(len(embeds))[None]
    video = VideoTokens(embeds[mask], grid, positions[:, mask], Prompt(embeds, positions, mask, ~mask))
    compared: dict[str, float] = {}
    for mode, variant in (("released", "official"), ("bidirectional", "paper")):
        policy = CaCoVIDPolicy.of_shape(shape, "none", variant=variant)
        # The release carries a third head that nothing reads.
        policy.load_state_dict({k: v for k, v in weights.items() if not k.startswith("mode_selection")})
        with torch.no_grad():
            tokens, frames = policy(video)
        compared[f"{mode} token logits"] = gap(tokens, archive[f"{case}/{mode}/token_logits"])
        compared[f"{mode} frame logits"] = gap(frames, archive[f"{case}/{mode}/frame_logits"])
        for key in (k for k in archive if k.startswith(f"{case}/{mode}/selected_topk")):
            ratio = float(key.rsplit("topk", 1)[1])
            kept = official_selection(_difference(tokens), _difference(frames), grid, ratio, 0.5, 1.5 * ratio)[0]
            compared[f"{mode} kept"] = same_indices(kept, archive[key])
    return judged("cacovid", case, compared)
