"""Settings that several families have, and how those are read that take more than a look."""

import math
from collections.abc import Callable, Mapping

from tfm_ref.config import Experts
from tfm_ref.families.family import HFConfig, Reader, read_fields
from tfm_ref.rotary import LinearScaling, Llama3Scaling, RopeScaling, YaRNScaling
from tfm_ref.validation import check_choice

TIED = {"tied_embeddings": ("tie_word_embeddings", True)}
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Our names of their activations."""


def activation(key: str, usual: str | None = None) -> Reader:
    """Read our name of the activation from a setting, which may be missing if one is usual."""

    def read(hf: HFConfig) -> str:
        kind = hf[key] if usual is None else hf.get(key, usual)
        check_choice(key, kind, ACTIVATIONS)
        return ACTIVATIONS[kind]

    return read


def rope(hf: HFConfig) -> HFConfig:
    """Find the settings of RoPE: in one place in version 5 of transformers, in two before."""
    together = hf.get("rope_parameters") or {}
    together = together.get("full_attention", together)
    return HFConfig(
        {"rope_theta": hf.get("rope_theta")} | (hf.get("rope_scaling") or {}) | together
    )


def rope_theta(usual: float) -> Reader:
    """Read the base of RoPE."""
    return lambda hf: float(rope(hf)["rope_theta"] or usual)


def mscale(factor: float, weight: float) -> float:
    """Give DeepSeek's factor for attention over longer sequences."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def yarn(hf: HFConfig) -> YaRNScaling:
    """Read YaRN, with the temperature of those who split it in two."""
    factor, own, all_dim = hf["factor"], hf.get("mscale"), hf.get("mscale_all_dim")
    temperature = hf.get("attention_factor")
    if temperature is None and own and all_dim:
        temperature = mscale(factor, own) / mscale(factor, all_dim)
    return YaRNScaling(
        factor=float(factor),
        original_length=hf["original_max_position_embeddings"],
        beta_fast=float(hf.get("beta_fast") or 32),
        beta_slow=float(hf.get("beta_slow") or 1),
        truncate=hf.get("truncate", True),
        temperature=temperature,
    )


SCALINGS: Mapping[str, Callable[[HFConfig], RopeScaling | None]] = {
    "default": lambda hf: None,
    "linear": lambda hf: LinearScaling(factor=float(hf["factor"])),
    "yarn": yarn,
    "llama3": lambda hf: Llama3Scaling(
        factor=float(hf["factor"]),
        low_freq_factor=float(hf["low_freq_factor"]),
        high_freq_factor=float(hf["high_freq_factor"]),
        original_length=hf["original_max_position_embeddings"],
    ),
}
"""How RoPE is stretched, by their names."""


def rope_scaling(hf: HFConfig) -> RopeScaling | None:
    """Read how RoPE is stretched."""
    settings = rope(hf)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    check_choice("rope_type", kind, SCALINGS)
    part = settings.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if part not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor must be 1.0; got {part}")
    return SCALINGS[kind](settings)


def window(hf: HFConfig) -> int | None:
    """Read the window, if any layer has one."""
    kinds = hf.get("layer_types")
    for kind in kinds or []:
        check_choice("each of layer_types", kind, ["sliding_attention", "full_attention"])
    if kinds is not None and len(kinds) != hf["num_hidden_layers"]:
        raise ValueError(
            f"layer_types must have num_hidden_layers ({hf['num_hidden_layers']}) entries; "
            f"got {len(kinds)}"
        )
    return hf["sliding_window"] if kinds is None or "sliding_attention" in kinds else None


def global_every(usual: int | None) -> Reader:
    """Read every how many-th layer has no window: as the config lists them, or as is usual."""

    def read(hf: HFConfig) -> int | None:
        kinds = hf.get("layer_types")
        if hf.get("sliding_window") is None or window(hf) is None:
            return None
        if kinds is None:
            return hf.get("sliding_window_pattern", usual)
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else None
        for layer, kind in enumerate(kinds):
            if (kind == "full_attention") != (every is not None and (layer + 1) % every == 0):
                raise ValueError(f"every n-th layer must have no window; got layer_types {kinds}")
        return every

    return read


def experts(fields: Mapping[str, object], **choices: object) -> Reader:
    """Read a mixture of experts: fields as those of a config are read, and what is always so."""
    return lambda hf: Experts(**read_fields(hf, fields), **choices)
