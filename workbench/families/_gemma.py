"""What the tiny models of Gemma 4 share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, VIDEO, random_model, rows_to_batch, text_config
from workbench.families import Batch

BEGIN, END, AUDIO = 118, 119, 117
HEIGHT, WIDTH = 2, 4
"""Tokens of a frame."""
WINDOW = 20
"""Tokens that a sliding layer sees: two frames and their times."""


def gemma_inputs(side: int, values: int) -> Callable[..., dict[str, Tensor]]:
    """Return the function that makes inputs; a token has `side` × `side` patches of `values` values each."""

    def inputs(batch: Batch, words: list[int], pad: str = "left", image: bool = False) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)
        size = HEIGHT * WIDTH

        def placeholders(frames: int) -> list[int]:
            # mm:ss and a space, then the frame between the markers of an image.
            return [i for f in range(frames) for i in (100, 109, 101 + f, 11, BEGIN, *[VIDEO] * size, END)]

        parts = [[placeholders(frames) for frames in videos] for videos in batch]
        found = rows_to_batch(parts, words, pad, draw, [BEGIN, *[IMAGE] * size, END] if image else [])
        counts = torch.tensor([frames for videos in batch for frames in videos])
        rows, columns = torch.arange(side * HEIGHT), torch.arange(side * WIDTH)
        places = torch.cartesian_prod(rows, columns).flip(-1)
        # As many patches of padding as a token more would have.
        places = torch.nn.functional.pad(places, (0, 0, 0, side**2), value=-1)

        def pixels(frames: int) -> Tensor:
            return torch.rand(frames, len(places), values, generator=draw) * (places[:, :1] >= 0)

        ids, total = found["input_ids"], int(counts.sum())
        found |= {
            "pixel_values_videos": pixels(total),
            "video_position_ids": places.repeat(total, 1, 1),
            "num_frames_per_video": counts,
            "mm_token_type_ids": 2 * (ids == VIDEO).long() + (ids == IMAGE).long(),
        }
        if image:
            found["pixel_values"] = pixels(len(batch))
            found["image_position_ids"] = places.repeat(len(batch), 1, 1)
        return found

    return inputs


def gemma_model(name: str, vision: dict[str, Any], spread: float, **text: Any) -> Callable[[int, int], Any]:
    """Return the function that makes a model of transformers' classes `name`; `text` are fields of its LLM."""

    def model(seed: int = 0, layers: int = 4) -> Any:
        kinds = ["sliding_attention", "full_attention"] * layers
        fields = text_config(layers, head_dim=16, global_head_dim=32) | text
        return random_model(
            name,
            seed,
            spread,
            vision_config=vision,
            text_config=fields
            | {
                "layer_types": kinds[:layers],
                "sliding_window": WINDOW,
                "use_bidirectional_attention": "vision",
                "final_logit_softcapping": 30.0,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            boi_token_id=BEGIN,
            eoi_token_id=END,
            tie_word_embeddings=False,
        )

    return model
