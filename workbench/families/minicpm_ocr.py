"""A tiny MiniCPM-OCR, a token for 2×2 patches."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._minicpm import minicpm_inputs, minicpm_model

TINY = Tiny(minicpm_model("MiniCPMOcr", tie_word_embeddings=False), minicpm_inputs(2, numbered=True), layers=4)
