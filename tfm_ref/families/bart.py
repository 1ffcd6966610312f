"""Encoder-decoders that normalise after each sub-layer: BART and Marian."""

from tfm_ref import architectures
from tfm_ref.families.family import Family
from tfm_ref.families.settings import TIED, activation

STACK_NAMES = """
encoder.positions.table                 model.encoder.embed_positions.weight
encoder.embedding_norm                  model.encoder.layernorm_embedding
encoder.blocks.*.attention.q_proj       model.encoder.layers.*.self_attn.q_proj
encoder.blocks.*.attention.k_proj       model.encoder.layers.*.self_attn.k_proj
encoder.blocks.*.attention.v_proj       model.encoder.layers.*.self_attn.v_proj
encoder.blocks.*.attention.o_proj       model.encoder.layers.*.self_attn.out_proj
encoder.blocks.*.attention_norm         model.encoder.layers.*.self_attn_layer_norm
encoder.blocks.*.feed_forward.up_proj   model.encoder.layers.*.fc1
encoder.blocks.*.feed_forward.down_proj model.encoder.layers.*.fc2
encoder.blocks.*.feed_forward_norm      model.encoder.layers.*.final_layer_norm
embedding.tokens                        model.encoder.embed_tokens
"""
CROSS_NAMES = """
decoder.blocks.*.cross_attention.q_proj model.decoder.layers.*.encoder_attn.q_proj
decoder.blocks.*.cross_attention.k_proj model.decoder.layers.*.encoder_attn.k_proj
decoder.blocks.*.cross_attention.v_proj model.decoder.layers.*.encoder_attn.v_proj
decoder.blocks.*.cross_attention.o_proj model.decoder.layers.*.encoder_attn.out_proj
decoder.blocks.*.cross_attention_norm   model.decoder.layers.*.encoder_attn_layer_norm
"""
NAMES = (
    """
embedding.tokens model.shared
head.proj.weight lm_head.weight
head.proj.bias   final_logits_bias [row]
"""
    + STACK_NAMES
    + STACK_NAMES.replace("encoder.", "decoder.")
    + CROSS_NAMES
)
FIELDS = TIED | {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_encoder_layers": "encoder_layers",
    "n_layers": "decoder_layers",
    "n_heads": "decoder_attention_heads",
    "d_ff": "decoder_ffn_dim",
    "max_seq_len": "max_position_embeddings",
    "scale_embeddings": "scale_embedding",
    "activation": activation("activation_function"),
}
ONLY = {
    "normalize_before": False,
    "add_final_layer_norm": False,
    "is_decoder": False,
    "share_encoder_decoder_embeddings": True,
    "encoder_ffn_dim": lambda hf: hf["decoder_ffn_dim"],
    "encoder_attention_heads": lambda hf: hf["decoder_attention_heads"],
    "decoder_vocab_size": lambda hf: hf["vocab_size"],
}

BART = Family(
    choices=architectures.BART | {"head_bias": True},
    fields=FIELDS,
    only=ONLY | {"normalize_embedding": True, "static_position_embeddings": False},
    names=NAMES,
)
MARIAN = Family(
    choices=architectures.MARIAN,
    fields=FIELDS,
    only=ONLY | {"normalize_embedding": False, "static_position_embeddings": True},
    names=NAMES,
    ignored=r".*embed_positions\.weight",
)
