"""Models that write, what they are given, and texts of the public library, for several tests."""

import re
from dataclasses import replace

import torch
from oracles import redraw
from parity.cases import CASES
from parity.test_parity import public, settings
from transformers import GenerationConfig

from tfm_ref import EncoderDecoder, Latent, TransformerConfig, build, from_hf

V, B, N, M, T = 13, 3, 6, 5, 7
SIZES = {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 10}
ROPE = TransformerConfig(**SIZES, positions="rope", norm_placement="pre", tied_embeddings=False)
CONFIGS = {
    "MHA, rope": ROPE,
    "GQA": replace(ROPE, n_kv_heads=2),
    "MQA": replace(ROPE, n_kv_heads=1),
    "latent": replace(
        ROPE, head_dim=4, latent=Latent(kv_lora_rank=6, rope_head_dim=4, v_head_dim=5)
    ),
    "learned": replace(ROPE, positions="learned", max_seq_len=N + T - 1),
    "sinusoidal": replace(ROPE, positions="sinusoidal"),
    "alibi": replace(ROPE, positions="alibi"),
    "t5": replace(ROPE, positions="t5", t5_buckets=8, t5_max_distance=9),
    "windows": replace(ROPE, window=3),
    "windows that do not slide": replace(ROPE, window=3, chunked=True),
    "windows, and all": replace(ROPE, window=3, global_every=2),
    "encoder-decoder": replace(ROPE, n_encoder_layers=2),
    "encoder-decoder, learned": replace(
        ROPE, positions="learned", max_seq_len=N + T - 1, n_encoder_layers=1
    ),
}
ENCODER = replace(ROPE, is_causal=False)
DECODER, BOTH = CONFIGS["MHA, rope"], CONFIGS["encoder-decoder"]
FIXED = [f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")]  # Marian's
PADDED = torch.tensor([[0] * (N - n) + [1] * n for n in (N, 2, 4)]).bool()


def ids(length, seed=0, batch=B):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def made(config):
    """Build a model with weights that all matter, in float64."""
    return talkative(redraw(build(config)).double().eval())


def talkative(model):
    """Let what is read matter more than constants, else a model says one token for ever."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in FIXED:
                p *= 2 if p.ndim > 1 else 0.1 if name.endswith("bias") else 1
            if re.search("cross_attention|encoder_attn|EncDecAttention", name):
                p *= 0.3
            if re.search("fc[12]", name):
                p *= 3
    return model


def arguments(model, padded=False):
    """Give prompts, or the begin of targets and their sources, with padding or without."""
    given = {"prompt": ids(N)}
    if isinstance(model, EncoderDecoder):
        given["source"] = ids(M, 1)
    if padded:
        given["prompt_mask"] = PADDED
        if isinstance(model, EncoderDecoder):
            given["source_mask"] = torch.tensor([[1] * n + [0] * (M - n) for n in (2, M, 1)]).bool()
    return given


def rows(given):
    """Give each row by itself, without its padding."""
    for i in range(B):
        row = {}
        for name in "prompt", "source":
            if name in given:
                mask = given.get(f"{name}_mask", torch.ones_like(given[name]).bool())
                row[name] = given[name][i, mask[i]][None]
        yield row


def log_probs(model, row, texts):
    """Give the log-probability of every next token after each text, in one run of the model."""
    texts = torch.tensor(texts, dtype=torch.long)
    prompt = torch.cat([row["prompt"].expand(len(texts), -1), texts], 1)
    given = [row["source"].expand(len(texts), -1), prompt] if "source" in row else [prompt]
    with torch.no_grad():
        return model(*given)[:, -1].log_softmax(-1)


def theirs_and_ours(name):
    case = next(case for case in CASES if case.name == name)
    dtype = torch.float64 if case.exact else torch.float32  # in which theirs is NaN at padding
    theirs = talkative(public(case, dtype))
    ours = from_hf(theirs.state_dict(), settings(theirs))
    tokens = torch.randint(3, 61, (6, 9), generator=torch.Generator().manual_seed(3))
    start, real = torch.ones(6, 1, dtype=torch.long), torch.ones_like(tokens)
    if case.kind == "both":
        named = {"input_ids": tokens, "decoder_input_ids": start, "attention_mask": real}
        return ours, theirs, {"prompt": start, "source": tokens}, named
    return ours, theirs, {"prompt": tokens}, {"input_ids": tokens, "attention_mask": real}


def telling(free):
    """Give the token that would end the rows at the most different places."""
    places = [(row == torch.arange(61)[:, None]).int().argmax(1) for row in free]
    return [max(range(61), key=lambda token: len({int(place[token]) for place in places}))]


def generate(theirs, named, **settings):
    """Generate with nothing but these settings, and give the new tokens."""
    theirs.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=1, decoder_start_token_id=1, do_sample=False
    )
    start = named.get("decoder_input_ids", named["input_ids"]).shape[1]
    out = theirs.generate(
        **named, **settings, max_new_tokens=12, return_dict_in_generate=True, output_scores=True
    )
    return out.sequences[:, start:], out.get("sequences_scores")


PUBLIC = ["GPT-2", "Llama, 2 key heads", "Mistral", "BART", "T5 1.1", "Marian"]
PAD = 60  # a 0 would be taken for none by the library, whose beams are then padded with a stop
STOPS = [5, 17, 23, 31, 40, 44, 52, 58]
