"""A tiny Qwen3.5: three recurrent layers, then one of full attention."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._qwen import qwen_inputs, qwen_model

VISION = {"depth": 2, "num_position_embeddings": 64}
TEXT = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    },
}

TINY = Tiny(qwen_model("Qwen3_5", VISION, TEXT, [2, 1, 1], 0.08), qwen_inputs(timed=True), layers=4)
