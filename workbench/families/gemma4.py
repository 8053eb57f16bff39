"""A tiny Gemma 4: windows and full attention take turns, the last two of four layers share keys and values."""

from __future__ import annotations

from vidsieve.testing.tiny_models import VISION, VOCABULARY
from workbench.families import Tiny
from workbench.families._gemma import gemma_inputs, gemma_model

TOWER = VISION | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16}
TEXT = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2}

TINY = Tiny(gemma_model("Gemma4", TOWER | {"pooling_kernel_size": 2}, 0.08, **TEXT), gemma_inputs(2, 48), layers=4)
