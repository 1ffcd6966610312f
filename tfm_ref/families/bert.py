"""Encoders that grew from BERT: BERT and RoBERTa."""

from collections.abc import Mapping

from torch import Tensor

from tfm_ref import architectures
from tfm_ref.families.family import Family
from tfm_ref.families.settings import SIZES, TIED, activation

BERT_NAMES = """
embedding.tokens                      bert.embeddings.word_embeddings
embedding.segments                    bert.embeddings.token_type_embeddings
stack.positions.table                 bert.embeddings.position_embeddings.weight
stack.embedding_norm                  bert.embeddings.LayerNorm
stack.blocks.*.attention.q_proj       bert.encoder.layer.*.attention.self.query
stack.blocks.*.attention.k_proj       bert.encoder.layer.*.attention.self.key
stack.blocks.*.attention.v_proj       bert.encoder.layer.*.attention.self.value
stack.blocks.*.attention.o_proj       bert.encoder.layer.*.attention.output.dense
stack.blocks.*.attention_norm         bert.encoder.layer.*.attention.output.LayerNorm
stack.blocks.*.feed_forward.up_proj   bert.encoder.layer.*.intermediate.dense
stack.blocks.*.feed_forward.down_proj bert.encoder.layer.*.output.dense
stack.blocks.*.feed_forward_norm      bert.encoder.layer.*.output.LayerNorm
pooler                                bert.pooler.dense
head.transform                        cls.predictions.transform.dense
head.norm                             cls.predictions.transform.LayerNorm
head.proj.bias                        cls.predictions.bias
head.proj                             cls.predictions.decoder
"""
ROBERTA_NAMES = (
    BERT_NAMES.replace(" bert.", " roberta.")
    .replace("cls.predictions.transform.LayerNorm", "lm_head.layer_norm")
    .replace("cls.predictions.transform.", "lm_head.")
    .replace("cls.predictions.", "lm_head.")
)
FIELDS = (
    SIZES
    | TIED
    | {
        "n_segments": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
        "activation": activation("hidden_act"),
    }
)
ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def pooled(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """See whether an encoder comes with a pooler: the same config stands beside both."""
    return {"pooler": any("pooler.dense" in name for name in tensors)}


BERT = Family(
    choices=architectures.BERT,
    fields=FIELDS,
    only=ONLY,
    names=BERT_NAMES,
    prefix="bert.",
    ignored=r".*position_ids|cls\.seq_relationship\..*",
    told_by_tensors=pooled,
)
ROBERTA = Family(
    choices=architectures.BERT,
    fields=FIELDS
    | {
        "first_position": lambda hf: hf["pad_token_id"] + 1,
        "max_seq_len": lambda hf: hf["max_position_embeddings"] - hf["pad_token_id"] - 1,
    },
    only=ONLY | {"hidden_act": "gelu"},  # its head has no other
    names=ROBERTA_NAMES,
    prefix="roberta.",
    ignored=r".*position_ids",
    told_by_tensors=pooled,
)
