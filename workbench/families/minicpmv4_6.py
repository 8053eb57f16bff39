"""A tiny MiniCPM-V 4.6, a token for 4×4 patches."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._minicpm import minicpm_inputs, minicpm_model

TINY = Tiny(minicpm_model("MiniCPMV4_6"), minicpm_inputs(4, numbered=True), layers=4)
