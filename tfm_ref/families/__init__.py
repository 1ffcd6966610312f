"""Families of public models: how their files spell the choices, and how they name the tensors.

What the models of a family do is in :mod:`tfm_ref.architectures`. Each kind of family has a file
with its tables of names, its settings and its :class:`~tfm_ref.families.family.Family`; what
several share is in :mod:`tfm_ref.families.settings`.
"""

from tfm_ref.families import bart, bert, deepseek, gemma, gpt, llama, llama4, mixture, t5
from tfm_ref.families.family import Family
from tfm_ref.validation import check_choice

FAMILIES = {
    "gpt2": gpt.GPT2,
    "bert": bert.BERT,
    "roberta": bert.ROBERTA,
    "t5": t5.T5,
    "switch_transformers": t5.SWITCH,
    "bart": bart.BART,
    "marian": bart.MARIAN,
    "bloom": gpt.BLOOM,
    "mpt": gpt.MPT,
    "falcon": gpt.FALCON,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "mixtral": mixture.MIXTRAL,
    "qwen3_moe": mixture.QWEN3_MOE,
    "llama4_text": llama4.LLAMA4,
    "gpt_oss": mixture.GPT_OSS,
    "deepseek_v2": deepseek.DEEPSEEK_V2,
    "deepseek_v3": deepseek.DEEPSEEK_V3,
}
"""The families, by the model_type of their config.json."""


def family_of(model_type: str) -> Family:
    """Look a family up.

    Raises:
        ValueError: if it is unknown.
    """
    check_choice("model_type", model_type, FAMILIES)
    return FAMILIES[model_type]
