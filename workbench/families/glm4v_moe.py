"""A tiny GLM-4.5V: a dense layer, then experts."""

from __future__ import annotations

from workbench.families import Tiny
from workbench.families._glm import glm_inputs, glm_model

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}

# Half of each head is turned, as in the checkpoints.
TINY = Tiny(glm_model("Glm4vMoe", (2, 1, 1), **EXPERTS), glm_inputs)
