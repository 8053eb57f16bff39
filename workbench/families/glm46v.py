"""A tiny GLM-4.6V."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._glm import glm_inputs, glm_model

TINY = Tiny(glm_model("Glm46V"), glm_inputs)
