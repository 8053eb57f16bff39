"""Cases of visionzip.npz: one frame or several, and a whole CLIP tower."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.adapters.probe import attention_modules, listening, received
from vidsieve.compressors.visionzip import merge, zipped


def cases(archive: Archive) -> Iterator[Case]:
    """Yield ``sel/*``, the tower, and the stitching of a still image's crops."""
    for case in groups(archive, 2):
        if case.startswith("sel/"):
            yield _selection(archive, case)
    if "tower/images" in archive:
        yield _tower(archive)
    if "anyres/output" in archive:
        features, kept = (torch.from_numpy(archive[f"anyres/{name}"]) for name in ("image_feature", "keep_idx"))
        made = stitched(features, kept.long(), int(archive["anyres/wh"][0]))
        yield judged("visionzip", "anyres", {"output": gap(made, archive["anyres/output"])})


def _selection(archive: Archive, case: str) -> Case:
    """Compare the dominant tokens, the contextual ones, who joins whom, and what the release hands on."""
    # The release sums over heads the class token's row; its order is that of the mean.
    attention = torch.from_numpy(archive[f"{case}/cls_attn_rows"]).mean(1)[:, 1:]
    hidden, metric = (torch.from_numpy(archive[f"{case}/{name}"]) for name in ("hidden", "metric"))
    dominant, contextual = (int(archive[f"{case}/{name}"]) for name in ("dominant_excl_cls", "contextual"))
    worst = {"dominant": 0.0, "contextual": 0.0, "members": 0.0, "output": 0.0}
    for frame in range(len(hidden)):
        found, rest, owner, output = _frame(attention[frame], metric[frame, 1:], hidden[frame], dominant, contextual)
        step = {
            "dominant": same_indices(found, np.sort(archive[f"{case}/all_indices"][frame][1:] - 1)),
            "contextual": same_indices(rest, archive[f"{case}/target_idx_in_rest"]),
            "members": same_indices(owner, archive[f"{case}/assign"][frame]),
            "output": gap(output, archive[f"{case}/output"][frame]),
        }
        worst = {name: max(value, step[name]) for name, value in worst.items()}
    return judged("visionzip", case, worst)


def _frame(
    attention: Tensor, metric: Tensor, hidden: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dominant tokens, contextual ones as places among the rest, owners of the others, and the output."""
    kept, targets, owner = zipped(attention, metric, dominant, contextual)
    left = torch.ones(len(attention), dtype=torch.bool)
    left[kept] = False
    rest = left.nonzero().flatten()
    merged = merge(hidden[1:], targets, owner, doubled=True)
    output = torch.cat([hidden[:1], hidden[1:][kept], merged])
    return kept, torch.searchsorted(rest, targets.contiguous()), owner[owner >= 0], output


def _tower(archive: Archive) -> Case:
    """Run the recorded CLIP with our probe on its last block but one."""
    prefix = "tower/w/"
    weights = {k[len(prefix) :]: torch.from_numpy(v) for k, v in archive.items() if k.startswith(prefix)}
    images = torch.from_numpy(archive["tower/images"])
    hidden = archive["tower/output"].shape[-1]
    inner = next(v.shape[0] for k, v in weights.items() if k.endswith("mlp.fc1.weight"))
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=24,
        num_attention_heads=2,
        image_size=84,
        patch_size=14,
        attn_implementation="sdpa",
    )
    model = CLIPVisionModel(config).eval()
    model.load_state_dict({_renamed(key, model): value for key, value in weights.items()}, strict=False)
    with torch.no_grad(), listening(config, attention_modules(model)[-2]) as notes:
        states = model(images, output_hidden_states=True).hidden_states[-2]
    attention, keys = received(*notes[0], cls_token=True)
    dominant, contextual = (int(archive[f"tower/{name}"]) for name in ("dominant_excl_cls", "contextual"))
    worst = {"keys": gap(keys, archive["tower/metric"][:, 1:]), "dominant": 0.0, "output": 0.0}
    for image in range(len(images)):
        found, _, _, output = _frame(attention[image], keys[image], states[image], dominant, contextual)
        theirs = np.sort(archive["tower/all_indices"][image][1:] - 1)
        worst["dominant"] = max(worst["dominant"], same_indices(found, theirs))
        worst["output"] = max(worst["output"], gap(output, archive["tower/output"][image]))
    return judged("visionzip", "tower", worst)


def _renamed(key: str, model: CLIPVisionModel) -> str:
    """Return a recorded parameter's name in the installed model, which may have dropped a prefix."""
    known = model.state_dict()
    return next(
        (name for name in (key, f"vision_model.{key}", key.removeprefix("vision_model.")) if name in known), key
    )


def stitched(features: Tensor, kept: Tensor, columns: int, side: int = 24) -> Tensor:
    """Return the tokens (crops·m, D) that the release hands on of a still image cut into crops, in its order.

    First the dominant tokens of all crops, in raster order over the stitched image, then every crop's class token, then
    every crop's contextual tokens.

    Parameters
    ----------
    features : Tensor, (crops, m, D)
        Of each crop its class token, its dominant tokens in raster order, its contextual tokens.
    kept : Tensor, (crops, 1 + k), int64
        The class token, 0, and the dominant ones in any order, counted from 1.
    columns : int
        Crops in a row of the image.
    side : int
        Patches on a side of a crop.
    """
    crops, count = kept.shape[0], kept.shape[1] - 1
    patch = kept[:, 1:].sort(1).values - 1  # (crops, k)
    crop = torch.arange(crops, device=kept.device)[:, None]
    row, column = crop // columns * side + patch // side, crop % columns * side + patch % side
    order = (row * columns * side + column).flatten().argsort()
    dominant = features[:, 1 : 1 + count].flatten(0, 1)[order]
    return torch.cat([dominant, features[:, 0], features[:, 1 + count :].flatten(0, 1)])
