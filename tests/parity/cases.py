"""The public models under test: tiny, with every branch of their family on."""

import inspect
from dataclasses import dataclass, field

import transformers
from torch import nn

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = SIZES | {"rms_norm_eps": 1e-5}
STACKS = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
SWITCH = T5 | {
    "num_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 6,
    "expert_capacity": 64,
}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA4 = LLAMA | {
    "intermediate_size_mlp": 40,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_local_experts": 6,
    "attention_chunk_size": 5,
    "floor_scale": 4,
    "attn_scale": 0.7,
}
MLA = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "n_group": 4,
    "topk_group": 2,
}


def rope(kind: str = "default", theta: float = 500.0, **numbers: float) -> dict:
    """Write the settings of RoPE as version 5 has them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}


@dataclass(frozen=True)
class Case:
    """One public model: the name of its config's class, and its settings.

    ``exact`` says how closely the public code keeps to float64: where it computes angles, norms
    or weights in float32, it does not.
    """

    name: str
    config: str
    settings: dict = field(default_factory=dict)
    exact: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> str:
        """Say what the model is: "encoder", "decoder" or "both"."""
        if self.config in ("BertConfig", "RobertaConfig"):
            return "encoder"
        two = "T5Config", "SwitchTransformersConfig", "BartConfig", "MarianConfig"
        return "both" if self.config in two else "decoder"

    def fixed(self, model) -> list[str]:
        """Name the parameters that nobody learns: Marian's sinusoids."""
        names = [name for name, _ in model.named_parameters()]
        return [n for n in names if self.name == "Marian" and "embed_positions" in n]

    @property
    def spread(self) -> float:
        """Say by what weights are made smaller: scores that nothing scales make noise loud."""
        return 0.5 if self.config in ("T5Config", "SwitchTransformersConfig") else 1.0

    @property
    def copies(self) -> dict[str, str]:
        """Name the parameters that are stored twice although nothing ties them."""
        untied = self.config == "BertConfig" and not self.settings.get("tie_word_embeddings", True)
        return {"cls.predictions.bias": "cls.predictions.decoder.bias"} if untied else {}

    def learned_buffers(self, model) -> list:
        """List the buffers that a checkpoint sets: biases of logits, and of choices of experts."""
        learned = "final_logits_bias", "e_score_correction_bias"
        return [buffer for name, buffer in model.named_buffers() if name.endswith(learned)]

    @property
    def buffers(self) -> list[str]:
        """Name what is a parameter in ours, and a buffer in theirs."""
        return ["head.proj.bias"] if self.config in ("BartConfig", "MarianConfig") else []

    @property
    def counts_padding(self) -> bool:
        """Say whether places are counted from the left end of a batch, padding or not."""
        return self.config == "Llama4TextConfig"

    @property
    def relative(self) -> bool:
        """Say whether only the distance of tokens matters."""
        return self.config in ("BloomConfig", "MptConfig")

    def takes_positions(self, model) -> bool:
        """Say whether the model is told where its tokens stand."""
        offered = "position_ids" in inspect.signature(model.forward).parameters
        return offered and self.config != "RobertaConfig"  # it finds the padding by itself

    def build(self, attention: str = "eager"):
        """Build the public model, with its plainest attention if not told otherwise."""
        config = getattr(transformers, self.config)(**self.settings, attn_implementation=attention)
        head = {"encoder": "MaskedLM", "decoder": "CausalLM", "both": "Seq2SeqLM"}[self.kind]
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
        if self.name == "T5 1.1":  # version 5 ties them, whatever the config says
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        if hasattr(config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # the other one knows no float64
        return model


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [
    Case(
        "GPT-2",
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    Case(
        "GPT-2, n_inner, untied",
        "GPT2Config",
        {
            "vocab_size": 61,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 40,
            "tie_word_embeddings": False,
            "activation_function": "relu",
        },
    ),
    Case("BERT", "BertConfig", SIZES | {"layer_norm_eps": 1e-3}),
    Case("BERT, untied", "BertConfig", SIZES | {"tie_word_embeddings": False}),
    Case("RoBERTa", "RobertaConfig", SIZES | {"pad_token_id": 1, "bos_token_id": 0}),
    Case("T5", "T5Config", T5, exact=False),
    Case(
        "T5 1.1, tied",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        exact=False,
    ),
    Case(
        "T5 1.1",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        exact=False,
    ),
    Case("Switch", "SwitchTransformersConfig", SWITCH | {"router_bias": True}, exact=False),
    Case(
        "Switch, tokens dropped",
        "SwitchTransformersConfig",
        SWITCH
        | {"expert_capacity": 3, "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 2},
        exact=False,
    ),
    Case("BART", "BartConfig", STACKS),
    Case("BART, scaled", "BartConfig", STACKS | {"scale_embedding": True}),
    Case(
        "Marian",
        "MarianConfig",
        STACKS | {"activation_function": "swish", "scale_embedding": True},
        exact=False,
    ),
    Case(
        "BLOOM",
        "BloomConfig",
        {
            "vocab_size": 61,
            "hidden_size": 36,
            "n_layer": 3,
            "n_head": 6,
            "layer_norm_epsilon": 1e-3,
        },
        exact=False,
    ),
    Case(
        "MPT",
        "MptConfig",
        {
            "vocab_size": 61,
            "d_model": 36,
            "n_layers": 3,
            "n_heads": 6,
            "max_seq_len": 64,
            "attn_config": {"softmax_scale": 0.3},
        },
        exact=False,
    ),
    Case("Falcon, MQA", "FalconConfig", SIZES | rope(), exact=False),
    Case(
        "Falcon, MHA, biases",
        "FalconConfig",
        SIZES | rope() | {"multi_query": False, "bias": True, "tie_word_embeddings": False},
        exact=False,
    ),
    *[
        Case(
            f"Llama, {g} key heads",
            "LlamaConfig",
            LLAMA | rope() | {"num_key_value_heads": g},
            exact=False,
        )
        for g in (4, 2, 1)
    ],
    Case(
        "Llama, tied, biases, head_dim",
        "LlamaConfig",
        LLAMA | rope() | {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 6},
        exact=False,
    ),
    Case("Llama 3.1", "LlamaConfig", LLAMA | rope("llama3", **LLAMA3), exact=False),
    Case("Llama, linear", "LlamaConfig", LLAMA | rope("linear", factor=2.0), exact=False),
    Case("Llama, YaRN", "LlamaConfig", LLAMA | rope("yarn", **YARN), exact=False),
    Case(
        "Mistral",
        "MistralConfig",
        LLAMA | rope() | {"num_key_value_heads": 2, "sliding_window": 5},
        exact=False,
    ),
    Case("Qwen2", "Qwen2Config", LLAMA | rope() | {"num_key_value_heads": 2}, exact=False),
    Case(
        "Qwen2, windows",
        "Qwen2Config",
        LLAMA
        | rope()
        | {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
        },
        exact=False,
    ),
    Case(
        "Qwen3",
        "Qwen3Config",
        LLAMA | rope() | {"num_key_value_heads": 2, "head_dim": 12},
        exact=False,
    ),
    Case(
        "Gemma 2",
        "Gemma2Config",
        LLAMA
        | rope()
        | {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
        exact=False,
    ),
    Case(
        "Gemma 3",
        "Gemma3TextConfig",
        LLAMA
        | {
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        exact=False,
    ),
    Case(
        "Mixtral",
        "MixtralConfig",
        LLAMA
        | rope()
        | {"num_key_value_heads": 2, "num_local_experts": 6, "sliding_window": 5}
        | EXPERTS,
        exact=False,
    ),
    *[
        Case(
            f"Qwen3-MoE, norm_topk_prob {norm}",
            "Qwen3MoeConfig",
            LLAMA
            | rope()
            | {
                "num_key_value_heads": 2,
                "head_dim": 12,
                "num_experts": 6,
                "moe_intermediate_size": 20,
                "norm_topk_prob": norm,
            }
            | EXPERTS,
            exact=False,
        )
        for norm in (True, False)
    ],
    Case(
        "gpt-oss",
        "GptOssConfig",
        LLAMA
        | rope("yarn", truncate=False, **YARN)
        | {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_local_experts": 6,
            "sliding_window": 5,
        }
        | EXPERTS,
        exact=False,
    ),
    Case("Llama 4", "Llama4TextConfig", LLAMA4 | rope("llama3", **LLAMA3), exact=False),
    Case(
        "Llama 4, every second a mixture, top 2, no QK-norm",
        "Llama4TextConfig",
        LLAMA4
        | rope()
        | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "attention_bias": True}
        | {"attn_temperature_tuning": False, "no_rope_layers": [1, 0, 1, 0]}
        | EXPERTS,
        exact=False,
    ),
    Case(
        "DeepSeek-V2",
        "DeepseekV2Config",
        LLAMA
        | MLA
        | rope("yarn", mscale=0.7, mscale_all_dim=0.7, **YARN)
        | {"q_lora_rank": 14, "topk_method": "group_limited_greedy"},
        exact=False,
    ),
    Case(
        "DeepSeek-V2, greedy",
        "DeepseekV2Config",
        LLAMA | MLA | rope() | {"q_lora_rank": None, "first_k_dense_replace": 0},
        exact=False,
    ),
    Case(
        "DeepSeek-V3",
        "DeepseekV3Config",
        LLAMA | MLA | rope("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN) | {"q_lora_rank": 14},
        exact=False,
    ),
    Case(
        "DeepSeek-V3, halves",
        "DeepseekV3Config",
        LLAMA | MLA | rope() | {"q_lora_rank": None, "rope_interleave": False},
        exact=False,
    ),
]
