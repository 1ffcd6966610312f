"""What config.json holds: of a small Llama, and of each family, as version 5 writes it."""

import json

from parity.cases import CASES

LLAMA = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 10,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
FIRST = {case.build().config.model_type: case for case in reversed(CASES)}
"""The first parity case of each family."""


def usual(model_type):
    """Give the settings of a family, as version 5 writes them."""
    return json.loads(FIRST[model_type].build().config.to_json_string(use_diff=False))
