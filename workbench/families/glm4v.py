"""A tiny GLM-4.1V."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._glm import glm_inputs, glm_model

TINY = Tiny(glm_model("Glm4v"), glm_inputs)
