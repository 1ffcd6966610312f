"""What the models of one architecture have in common, beyond what the paper of 2017 does.

Each is a set of fields of :class:`~tfm_ref.config.TransformerConfig`.
"""

GPT2 = {
    "positions": "learned",
    "scale_embeddings": False,
    "norm_placement": "pre",
    "attention_bias": True,
    "activation": "gelu_tanh",
}
BERT = {
    "is_causal": False,
    "positions": "learned",
    "scale_embeddings": False,
    "embedding_norm": True,
    "head_transform": True,
    "head_bias": True,
    "attention_bias": True,
    "activation": "gelu",
}
T5 = {
    "positions": "t5",
    "scale_embeddings": False,
    "scale_logits": True,
    "norm": "rms_norm",
    "norm_eps": 1e-6,
    "norm_placement": "pre",
    "attention_scale": 1.0,
    "feed_forward_bias": False,
}
BART = {
    "positions": "learned",
    "first_position": 2,
    "scale_embeddings": False,
    "embedding_norm": True,
    "attention_bias": True,
    "activation": "gelu",
}
MARIAN = {
    "sinusoid_halves": True,
    "head_bias": True,
    "attention_bias": True,
    "activation": "silu",
}
BLOOM = {
    "positions": "alibi",
    "scale_embeddings": False,
    "embedding_norm": True,
    "norm_placement": "pre",
    "attention_bias": True,
    "activation": "gelu_tanh",
}
MPT = {
    "positions": "alibi",
    "scale_embeddings": False,
    "norm": "layer_norm_no_bias",
    "norm_placement": "pre",
    "activation": "gelu",
    "feed_forward_bias": False,
}
FALCON = {
    "positions": "rope",
    "scale_embeddings": False,
    "norm_placement": "pre",
    "parallel": True,
    "n_kv_heads": 1,
    "activation": "gelu",
    "feed_forward_bias": False,
}
LLAMA = {
    "positions": "rope",
    "scale_embeddings": False,
    "tied_embeddings": False,
    "norm": "rms_norm",
    "norm_placement": "pre",
    "activation": "silu",
    "gated": True,
    "feed_forward_bias": False,
}
LLAMA3 = LLAMA | {"rope_theta": 500_000.0, "n_kv_heads": 8}
MIXTRAL = LLAMA | {"rope_theta": 1e6, "n_kv_heads": 8}
PALM = LLAMA | {
    "norm": "layer_norm_no_bias",
    "parallel": True,
    "n_kv_heads": 1,
    "tied_embeddings": True,
    "scale_logits": True,
}
QWEN2 = LLAMA | {"norm_eps": 1e-6, "attention_bias": "qkv"}
QWEN3 = LLAMA | {
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "head_dim": 128,
    "qk_norm": "rms_norm",
}
GEMMA = LLAMA | {
    "scale_embeddings": True,
    "tied_embeddings": True,
    "norm_eps": 1e-6,
    "norm_placement": "both",
    "activation": "gelu_tanh",
}
GEMMA2 = GEMMA | {
    "logit_softcap": 30.0,
    "attention_softcap": 50.0,
    "window": 4096,
    "global_every": 2,
}
GEMMA3 = GEMMA | {
    "qk_norm": "rms_norm",
    "rope_theta": 1e6,
    "local_rope_theta": 10_000.0,
    "global_every": 6,
}
LLAMA4 = LLAMA | {
    "rope_interleaved": True,
    "chunked": True,
    "global_positions": False,
}
GPT_OSS = LLAMA | {
    "attention_bias": True,
    "sinks": True,
    "window": 128,
    "global_every": 2,
    "activation": "swiglu_clamped",
    "feed_forward_bias": True,
}
DEEPSEEK = LLAMA | {"norm_eps": 1e-6, "rope_interleaved": True}
