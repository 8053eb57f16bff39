"""A tiny Gemma 4 without a vision tower: a token is a patch of 8 pixels."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._gemma import gemma_inputs, gemma_model

PATCHES = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}

TINY = Tiny(gemma_model("Gemma4Unified", PATCHES, 0.08), gemma_inputs(1, 192), layers=4)
