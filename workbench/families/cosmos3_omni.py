"""A tiny Cosmos 3 Omni."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._qwen import qwen_inputs, qwen_model
from workbench.families.qwen3_vl_moe import VISION

TINY = Tiny(qwen_model("Cosmos3Omni", VISION, {}, [4, 2, 2]), qwen_inputs(timed=True))
