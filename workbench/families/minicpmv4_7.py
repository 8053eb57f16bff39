"""A tiny MiniCPM-V 4.7, a token for 4×4 patches."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._minicpm import (
    FRAME,
    FRAME_END,
    NEWLINE,
    SLICE,
    SLICE_END,
    minicpm_inputs,
    minicpm_model,
)

MARKERS = {
    "image_start_id": FRAME,
    "image_end_id": FRAME_END,
    "slice_start_id": SLICE,
    "slice_end_id": SLICE_END,
    "newline_id": NEWLINE,
}

TINY = Tiny(minicpm_model("MiniCPMV4_7", **MARKERS), minicpm_inputs(4, numbered=False), layers=4)
