"""A tiny GLM-OCR."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._glm import glm_inputs, glm_model

TINY = Tiny(glm_model("GlmOcr"), glm_inputs)
