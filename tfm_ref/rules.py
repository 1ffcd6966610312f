"""The rules of a config: which choice needs which, and what no choice may be."""

from collections.abc import Mapping

from tfm_ref.validation import check_dropout, check_size, check_softcap

RULES = [
    (("first_position",), "positions", "learned"),
    (("sinusoid_halves",), "positions", "sinusoidal"),
    (("rope_theta", "rope_dim", "rope_interleaved", "rope_scaling"), "positions", "rope"),
    (("t5_buckets", "t5_max_distance"), "positions", "t5"),
    (("local_rope_theta",), "positions", "rope"),
    (("local_rope_theta", "global_positions", "global_qk_norm"), "global_every", ...),
    (("global_qk_norm",), "qk_norm", ...),
    (("chunked", "global_every", "n_first"), "window", ...),
    (("n_first",), "chunked", False),
    (("window", "n_encoder_layers"), "is_causal", True),
    (("pooler",), "is_causal", False),
    (("parallel",), "norm_placement", "pre"),
    (("parallel", "latent", "window", "n_segments"), "n_encoder_layers", 0),
    (("n_kv_heads", "rope_dim", "qk_norm", "attention_softcap", "sinks"), "latent", None),
    (("latent",), "positions", "rope"),
]
"""The fields on the left need the choice on the right; ``...`` is any that is given."""


def check_rules(choices: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Refuse choices that contradict each other, and numbers that none can be.

    What a layer refuses by itself is not repeated here.

    Args:
        choices: the fields of a :class:`~tfm_ref.config.TransformerConfig`, by name.
        defaults: what each field is where it is not given.

    Raises:
        ValueError: if two choices contradict each other, a size is not an integer or too small,
            or a number is out of its bounds; the message states the rule.

    Example:
        >>> from tfm_ref import TransformerConfig
        >>> sizes = {"vocab_size": 10, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
        >>> TransformerConfig(**sizes, parallel=True)
        Traceback (most recent call last):
        ValueError: parallel = True needs norm_placement = 'pre'; got 'post'
    """
    for names, choice, wanted in RULES:
        got = choices[choice]
        if got == wanted or (wanted is ... and got is not None):
            continue
        needs = f"{choice} to be given" if wanted is ... else f"{choice} = {wanted!r}"
        for name in names:
            if choices[name] != defaults[name]:
                raise ValueError(f"{name} = {choices[name]!r} needs {needs}; got {got!r}")
    for name in "vocab_size", "n_layers":
        check_size(name, choices[name])
    for name in "n_encoder_layers", "n_segments", "first_position", "n_first":
        check_size(name, choices[name], least=0)
    for name in "max_seq_len", "window", "global_every":
        if choices[name] is not None:
            check_size(name, choices[name])
    if choices["positions"] == "learned" and choices["max_seq_len"] is None:
        raise ValueError("positions = 'learned' needs max_seq_len to be given; got None")
    head_dim, attention_bias = choices["head_dim"], choices["attention_bias"]
    if choices["latent"] is not None and (head_dim is None or not isinstance(attention_bias, bool)):
        raise ValueError(
            "latent attention needs head_dim to be given, and attention_bias to be True or "
            f"False; got {head_dim} and {attention_bias!r}"
        )
    experts = choices["experts"]
    if experts is not None:
        check_size("n_dense_layers", experts.n_dense_layers, least=0, most=choices["n_layers"])
        check_size("every", experts.every)
    if choices["logit_softcap"] is not None:
        check_softcap(choices["logit_softcap"])
    if not choices["norm_eps"] >= 0:
        raise ValueError(f"norm_eps must be at least 0; got {choices['norm_eps']}")
    check_dropout(choices["dropout"])
