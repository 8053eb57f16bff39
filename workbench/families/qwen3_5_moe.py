"""A tiny Qwen3.5 with experts."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._qwen import qwen_inputs, qwen_model
from workbench.families.qwen3_5 import TEXT, VISION

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

TINY = Tiny(qwen_model("Qwen3_5Moe", VISION, TEXT | EXPERTS, [2, 1, 1], 0.08), qwen_inputs(timed=True), layers=4)
