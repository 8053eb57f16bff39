"""A tiny Qwen3-VL with experts."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._qwen import qwen_inputs, qwen_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
VISION = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}

TINY = Tiny(qwen_model("Qwen3VLMoe", VISION, EXPERTS, [4, 2, 2]), qwen_inputs(timed=True))
