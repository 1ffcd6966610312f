"""Generation against plain loops, enumeration and the public library, and what is refused."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import draw, redraw
from parity.cases import CASES
from parity.test_parity import public, settings
from torch.testing import assert_close
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tfm_ref import (
    EncoderDecoder,
    Latent,
    TransformerConfig,
    beam_search,
    build,
    from_hf,
    greedy,
    sample,
    sampling_probs,
    top_k_filter,
    top_p_filter,
)
from tfm_ref.generation import PENALTIES, _best

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
METHODS = {
    "greedy": greedy,
    "sample": lambda *args, **terms: sample(
        *args, **terms, top_p=0.9, generator=torch.Generator().manual_seed(0)
    ),
    "beam_search": beam_search,
}
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


def plain_greedy(model, row, stop=()):
    text = []
    while len(text) < T and (not text or text[-1] not in stop):
        text.append(int(log_probs(model, row, [text])[0].argmax()))
    return text


def plain_beams(model, row, n_beams, lp, stop, length=T):
    """Beam search as one would write it on paper: lists, and no stopping."""
    beams, done = [([], 0.0)], []
    for step in range(1, length + 1):
        after = log_probs(model, row, [text for text, _ in beams]).tolist()
        longer = [
            ([*text, token], total + p)
            for (text, total), row_of in zip(beams, after, strict=True)
            for token, p in enumerate(row_of)
        ]
        longer.sort(key=lambda text: -text[1])
        over = [text[-1] in stop or step == length for text, _ in longer]
        done += [
            (text, total / lp(step))
            for (text, total), ends in zip(longer[:n_beams], over, strict=False)
            if ends
        ]
        beams = [beam for beam, ends in zip(longer, over, strict=True) if not ends][:n_beams]
        if not beams:
            break
    return sorted(done, key=lambda text: -text[1])[:n_beams]


def every_text(model, row, stop, lp, length):
    """Score every text that there is, best first."""
    texts, scored = [([], 0.0)], []
    for step in range(1, length + 1):
        after = log_probs(model, row, [text for text, _ in texts]).tolist()
        texts = [
            ([*text, token], total + p)
            for (text, total), row_of in zip(texts, after, strict=True)
            for token, p in enumerate(row_of)
        ]
        over = [text[-1] in stop or step == length for text, _ in texts]
        scored += [(t, s / lp(step)) for (t, s), ends in zip(texts, over, strict=True) if ends]
        texts = [text for text, ends in zip(texts, over, strict=True) if not ends]
    return sorted(scored, key=lambda text: -text[1])


def lists(found, i):
    """Give the hypotheses of a row as lists, with their scores."""
    pairs = zip(found.tokens[i], found.lengths[i], found.scores[i], strict=True)
    return [(text[:n].tolist(), float(score)) for text, n, score in pairs if n]


def assert_same_texts(got, expected):
    assert [text for text, _ in got] == [text for text, _ in expected]
    assert_close(*(torch.tensor([s for _, s in texts]).double() for texts in (got, expected)))


def gnmt(power):
    return lambda length: ((5 + length) / 6) ** power


# --- greedy


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_plain_loop_row_by_row(name, use_cache):
    model = made(CONFIGS[name])
    for padded in False, True:
        given = arguments(model, padded)
        got = greedy(model, **given, max_new_tokens=T, use_cache=use_cache)
        assert got.tolist() == [plain_greedy(model, row) for row in rows(given)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_with_a_cache_the_tokens_are_the_same(name, method, padded):
    model = made(CONFIGS[name])
    terms = arguments(model, padded) | {"max_new_tokens": T, "stop": [3, 7]}
    got, expected = (METHODS[method](model, **terms, use_cache=c) for c in (True, False))
    assert_close(got, expected)


@pytest.mark.parametrize("method", METHODS)
def test_each_step_computes_only_what_is_new(method):
    """With a cache, the model reads the prompt once and then one token at a time."""
    for config in DECODER, BOTH:
        model, lengths, heads = made(config), [], []
        stack = model.decoder if config is BOTH else model.stack
        stack.register_forward_pre_hook(lambda _, args, to=lengths: to.append(args[0].shape[1]))
        model.head.register_forward_pre_hook(lambda _, args, to=heads: to.append(args[0].shape[1]))
        METHODS[method](model, **arguments(model), max_new_tokens=4)
        assert lengths == [N, 1, 1, 1]
        METHODS[method](model, **arguments(model), max_new_tokens=4, use_cache=False)
        assert lengths[4:] == [N, N + 1, N + 2, N + 3]
        assert set(heads) == {1}


def test_first_tokens_that_are_padding_are_refused():
    """A window that keeps the first tokens in sight would keep padding; without it, all is well."""
    model = made(replace(DECODER, window=3, n_first=2))
    prompt, mask = ids(4), torch.ones(B, 4, dtype=torch.bool)
    whole = [
        greedy(model, prompt, max_new_tokens=T, prompt_mask=m, use_cache=cached)
        for m, cached in ((None, True), (mask, True), (None, False))
    ]
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], whole[2])
    mask[0, 0] = False
    with pytest.raises(ValueError, match=r"n_first \(2\) needs prompts without .* got 1 places"):
        greedy(model, prompt, max_new_tokens=T, prompt_mask=mask)


def test_decoding_from_the_padding():
    """Padded on the right, a prompt would be continued from its padding: with other tokens.

    The bug of many batches. That of the Annotated Transformer, issue 127, is its cousin: its copy
    task trains targets that begin with 1, and decodes from 0, the padding.
    """
    model, short = made(DECODER), ids(2, batch=1)
    right = torch.cat([short, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.tensor([[True, True, False, False, False]])
    expected = greedy(model, short, max_new_tokens=T)
    with torch.no_grad():
        from_padding = model(right, mask=mask[:, None, None])[:, -1].argmax(-1)
        from_text = model(right, mask=mask[:, None, None])[:, 1].argmax(-1)
    assert from_text == expected[0, 0]
    assert from_padding != expected[0, 0]
    with pytest.raises(ValueError, match="prompts must be padded on the left"):
        greedy(model, right, prompt_mask=mask, max_new_tokens=T)
    got = greedy(
        model, right.flip(1)[:, [0, 1, 2, 4, 3]], prompt_mask=mask.flip(1), max_new_tokens=T
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_a_source_may_be_padded_on_either_side(positions):
    """Positions are counted from its first real token, too."""
    model = made(replace(BOTH, positions=positions, max_seq_len=N + T))
    prompt, source, real = ids(N), ids(M, 1), torch.arange(M).expand(B, -1) < 3
    expected = greedy(model, prompt, source=source[:, :3], max_new_tokens=T)
    for shift in 0, 2:
        turned = {"source": source.roll(shift, 1), "source_mask": real.roll(shift, 1)}
        assert torch.equal(greedy(model, prompt, **turned, max_new_tokens=T), expected)


# --- stop tokens


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("config", [DECODER, BOTH], ids=["decoder", "both"])
def test_stop_tokens_end_a_text_and_are_part_of_it(config, use_cache):
    model = made(config)
    given = arguments(model)
    free = greedy(model, **given, max_new_tokens=T)
    stop = [int(free[0, 2]), int(free[1, 1])]
    expected = [plain_greedy(model, row, stop) for row in rows(given)]
    longest = max(map(len, expected))
    assert {len(text) for text in expected} != {longest}
    for pad in None, 5:
        got = greedy(model, **given, max_new_tokens=T, stop=stop, pad=pad, use_cache=use_cache)
        filled = [t + [stop[0] if pad is None else pad] * (longest - len(t)) for t in expected]
        assert got.tolist() == filled


@pytest.mark.parametrize("method", METHODS)
def test_all_stopped_is_the_end(method):
    """Nothing is computed after it; of a stop token in the prompt, nothing is thought."""
    model, calls = made(DECODER), []
    model.stack.register_forward_pre_hook(lambda *_: calls.append(1))
    got = METHODS[method](model, ids(N), max_new_tokens=T, stop=range(V))
    tokens = got if method != "beam_search" else got.tokens
    assert tokens.shape[-1] == 1
    assert len(calls) == 1


def test_a_stop_token_in_the_prompt_ends_nothing():
    model = made(DECODER)
    free = greedy(model, ids(N), max_new_tokens=T)
    unused = next(t for t in range(V) if t not in free)
    prompt = ids(N)
    prompt[:, 2] = unused
    free = greedy(model, prompt, max_new_tokens=T)
    stop = next(t for t in prompt[0].tolist() if t not in free)
    assert torch.equal(greedy(model, prompt, max_new_tokens=T, stop=stop), free)


def test_one_stop_token_may_come_without_brackets():
    model = made(DECODER)
    for method in METHODS.values():
        terms = {"max_new_tokens": T}
        one, several = (method(model, ids(N), **terms, stop=stop) for stop in (3, (3,)))
        assert_close(one, several)


# --- sampling


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    infinite = -math.inf
    assert top_k_filter(logits, 1).exp().tolist() == [[0.5, 0, 0], [0, pytest.approx(0.6), 0]]
    kept = top_p_filter(logits, 0.55) > infinite
    assert kept.tolist() == [[True, True, False], [False, True, False]]
    kept = top_p_filter(logits, 0.65) > infinite
    assert kept.tolist() == [[True, True, False], [False, True, True]]
    even = torch.zeros(4)
    assert (top_k_filter(even, 2) > infinite).all()  # all equal the last that is kept
    assert (top_p_filter(even, 0.5) > infinite).tolist() == [True, True, False, False]
    assert (top_p_filter(even, 0.51) > infinite).tolist() == [True, True, True, False]
    assert (top_p_filter(even, 1e-30) > infinite).tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_float32_keeps(dtype):
    """Sums of thousands of small probabilities need more than eight bits."""
    logits = draw(2, 20_000).to(dtype)
    for top_p in 0.5, 0.9, 0.99:
        kept, expected = (top_p_filter(x, top_p) > -math.inf for x in (logits, logits.float()))
        assert torch.equal(kept, expected)


def test_what_keeps_all_changes_nothing():
    logits = 30 * draw(50, V)
    assert torch.equal(top_k_filter(logits, V), logits)
    assert torch.equal(top_p_filter(logits, 1.0), logits)
    assert torch.equal(sampling_probs(logits), logits.softmax(-1))
    assert torch.equal(sampling_probs(logits, temperature=2.0), (logits / 2).softmax(-1))


@given(st.floats(0.1, 5), st.integers(1, V), st.floats(0.01, 1), st.integers(0, 99))
def test_the_distribution_is_that_of_the_library(temperature, top_k, top_p, seed):
    """In the same order: temperature, top-k, top-p."""
    logits = 2 * draw(4, V, seed=seed).double()
    warpers = TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)
    expected = LogitsProcessorList(warpers)(None, logits).softmax(-1)
    got = sampling_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert_close(got, expected)
    assert_close(top_k_filter(logits, top_k), TopKLogitsWarper(top_k)(None, logits))
    assert_close(top_p_filter(logits, top_p), TopPLogitsWarper(top_p)(None, logits))


@given(st.floats(0.01, 0.99), st.integers(0, 99))
def test_top_p_keeps_the_fewest_that_reach_it(top_p, seed):
    probs = draw(V, seed=seed).double().softmax(-1)
    kept = probs[top_p_filter(probs.log(), top_p) > -math.inf]
    assert kept.sum() >= top_p - 1e-12
    assert kept.sum() - kept.min() < top_p
    assert kept.min() > max([p for p in probs if p not in kept], default=0)


SETTINGS = {"temperature": 1.5, "top_k": 8, "top_p": 0.9}


@pytest.mark.parametrize("terms", [{}, SETTINGS], ids=["plain", "filtered"])
def test_draws_follow_the_distribution(terms):
    """Chi-square of first tokens and of second ones, below what one in ten thousand exceeds."""
    model, row = made(DECODER), {"prompt": ids(N, batch=1)}
    with torch.no_grad():
        for p in model.head.parameters():
            p /= 3
    count = 4000
    got = sample(model, row["prompt"].expand(count, -1), max_new_tokens=2, **terms)
    first = sampling_probs(log_probs(model, row, [[]]), **terms)[0]
    after = sampling_probs(log_probs(model, row, [[t] for t in range(V)]), **terms)
    for tokens, probs in ((got[:, 0], first), (got[:, 1], first @ after)):
        expected, seen = count * probs, torch.bincount(tokens, minlength=V)
        assert (seen[expected == 0] == 0).all()
        likely = expected > 5
        assert likely.sum() > 4
        chi = ((seen - expected).square() / expected)[likely].sum()
        assert chi < {5: 25.8, 6: 27.9, 7: 29.9, 8: 31.9}.get(int(likely.sum()), 40.9)
    assert (first == 0).any() == bool(terms)


def test_seeds():
    """The same seed gives the same tokens; without one, PyTorch's own is asked."""
    model, terms = made(DECODER), {"max_new_tokens": T, **SETTINGS}

    def draws(seed):
        return sample(model, ids(N), **terms, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))
    torch.manual_seed(1)
    first = sample(model, ids(N), **terms)
    assert not torch.equal(first, sample(model, ids(N), **terms))
    torch.manual_seed(1)
    assert torch.equal(first, sample(model, ids(N), **terms))
    before = torch.get_rng_state()
    draws(1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("terms", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_no_chance_is_greedy(terms):
    for config in DECODER, BOTH:
        model = made(config)
        given = arguments(model, padded=True) | {"max_new_tokens": T, "stop": 3}
        assert torch.equal(sample(model, **given, **terms), greedy(model, **given))


def test_rows_that_have_stopped_draw_nothing_new():
    model = made(DECODER)
    got = sample(model, ids(N, batch=50), max_new_tokens=T, stop=[3, 7], pad=11)
    ends = torch.isin(got, torch.tensor([3, 7]))
    stopped = ends.cumsum(-1) - ends.long() > 0
    assert (got[stopped] == 11).all()
    assert stopped.any()
    assert not stopped[:, -1].all()


# --- beam search


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("power", [-1.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("config", [DECODER, BOTH], ids=["decoder", "both"])
def test_with_a_beam_for_every_text_it_is_exhaustive_search(config, power, penalty):
    """All texts of at most 3 tokens, in order of their scores."""
    model = made(replace(config, vocab_size=4))
    given = {name: ids_ % 4 for name, ids_ in arguments(model).items()}
    terms = {"length_penalty": power, "penalty": penalty, "stop": 2, "max_new_tokens": 3}
    found = beam_search(model, **given, **terms, n_beams=45)
    for i, row in enumerate(rows(given)):
        expected = every_text(model, row, [2], lambda n: PENALTIES[penalty](n, power), 3)
        assert len(expected) == 1 + 3 + 9 * 4
        assert_same_texts(lists(found, i), expected)
    assert (found.scores[:, 40:] == -math.inf).all()
    assert (found.lengths[:, 40:] == 0).all()
    assert (found.tokens[:, 40:] == 2).all()


@pytest.mark.parametrize(("n_beams", "power"), [(1, 0.6), (3, 0.0), (4, 0.6), (4, 3.0), (5, -0.5)])
@pytest.mark.parametrize("name", ["MHA, rope", "encoder-decoder", "learned"])
def test_beams_are_those_of_paper_and_pencil(name, n_beams, power):
    """Row by row, without stopping: so padding, batch and stopping have changed nothing."""
    model, stop = made(CONFIGS[name]), [3, 7]
    terms = {"n_beams": n_beams, "length_penalty": power, "stop": stop}
    for padded in False, True:
        given = arguments(model, padded)
        found = beam_search(model, **given, **terms, max_new_tokens=T)
        for i, row in enumerate(rows(given)):
            expected = plain_beams(model, row, n_beams, gnmt(power), stop)
            assert_same_texts(lists(found, i), expected)


def test_scores_are_those_of_a_full_run():
    for config in DECODER, BOTH:
        model = made(config)
        given = arguments(model)
        found = beam_search(model, **given, max_new_tokens=T, stop=[3, 7], length_penalty=0.8)
        assert len(set(found.lengths.flatten().tolist())) > 1
        assert found.scores.dtype == torch.float64
        assert found.tokens.shape[-1] == found.lengths.max()
        for i, row in enumerate(rows(given)):
            assert (found.scores[i].diff() <= 0).all()
            for text, score in lists(found, i):
                total = sum(
                    log_probs(model, row, [text[:n]])[0, token] for n, token in enumerate(text)
                )
                assert_close(float(total / gnmt(0.8)(len(text))), score)


def test_one_beam_is_greedy():
    """Content with the first text, always; else, with a penalty, a longer one may be better."""
    for config in DECODER, BOTH:
        model = made(config)
        given = arguments(model) | {"max_new_tokens": T, "stop": [3, 7]}
        expected = greedy(model, **given)
        for terms in {"early_stopping": True, "length_penalty": 5.0}, {"length_penalty": 0.0}:
            assert torch.equal(
                beam_search(model, **given, n_beams=1, **terms).tokens[:, 0], expected
            )
        free = {**given, "stop": None}
        assert torch.equal(
            beam_search(model, **free, n_beams=1).tokens[:, 0], greedy(model, **free)
        )


def test_more_beams_find_texts_that_are_no_worse():
    """Not a law, as beams crowd each other out, but what they are for: seen over all rows."""
    model, prompt = made(DECODER), ids(N, batch=40)
    terms = {"max_new_tokens": T, "length_penalty": 0.0}
    best = [beam_search(model, prompt, **terms, n_beams=k).scores[:, 0].mean() for k in (1, 4, 12)]
    assert best[0] < best[1] < best[2]


@pytest.mark.parametrize("power", [0.0, 0.6])
def test_stopping_comes_before_the_last_token(power):
    """And when it comes, nothing that the model might still say could be better."""
    model, calls = made(DECODER), []
    model.head.proj.weight.data[3] += 1.0
    model.stack.register_forward_pre_hook(lambda *_: calls.append(1))
    prompt = ids(N, batch=1)
    terms = {"n_beams": 2, "length_penalty": power, "stop": [3, 7]}
    found = beam_search(model, prompt, **terms, max_new_tokens=30)
    assert len(calls) < 30
    expected = plain_beams(model, {"prompt": prompt}, 2, gnmt(power), [3, 7], 30)
    assert_same_texts(lists(found, 0), expected)


@pytest.mark.parametrize(("n_beams", "power", "sure"), [(1, 5.0, 1), (2, -3.0, 1), (2, -3.0, 4)])
def test_stopping_changes_nothing(n_beams, power, sure):
    """Neither where longer texts gain by the penalty, nor where they lose."""
    model, prompt, stop = made(DECODER), ids(N, batch=12), [3, 7, 1, 9]
    model.head.proj.weight.data *= sure
    terms = {"n_beams": n_beams, "length_penalty": power, "stop": stop, "max_new_tokens": 9}
    found = beam_search(model, prompt, **terms)
    for i in range(12):
        row = {"prompt": prompt[i : i + 1]}
        assert_same_texts(lists(found, i), plain_beams(model, row, n_beams, gnmt(power), stop, 9))


def test_early_stopping_takes_the_first():
    model, calls = made(DECODER), []
    model.stack.register_forward_pre_hook(lambda *_: calls.append(1))
    terms = {"max_new_tokens": 20, "n_beams": 3, "stop": [3, 7, 1], "length_penalty": 3.0}
    patient, steps = beam_search(model, ids(N), **terms), len(calls)
    hasty = beam_search(model, ids(N), **terms, early_stopping=True)
    assert len(calls) - steps < steps
    assert (hasty.scores <= patient.scores).all()
    assert (hasty.scores < patient.scores).any()
    assert hasty.scores.isfinite().all()


def test_a_row_that_is_done_does_not_wait_for_the_others():
    model = made(DECODER)
    for early_stopping in True, False:
        terms = {"stop": [3, 7], "early_stopping": early_stopping, "max_new_tokens": T}
        together = beam_search(model, ids(N), **terms)
        for i in range(B):
            alone = beam_search(model, ids(N)[i : i + 1], **terms)
            assert_same_texts(lists(together, i), lists(alone, 0))


def test_of_equals_the_first_is_the_better():
    """A model to which all tokens are alike writes by the order of the numbers."""
    model = made(DECODER)
    model.head.proj.weight.data.zero_()
    assert (greedy(model, ids(N), max_new_tokens=2) == 0).all()
    found = beam_search(model, ids(N), max_new_tokens=2, n_beams=15)
    pairs = [*itertools.product(range(V), repeat=2)]
    assert found.tokens[0].tolist() == [[*p] for p in pairs[:15]]
    found = beam_search(model, ids(N), max_new_tokens=2, n_beams=3, stop=1, length_penalty=0.0)
    assert lists(found, 0)[0] == ([1], pytest.approx(-math.log(V)))
    assert [text for text, _ in lists(found, 0)] == [[1], [0, 0], [0, 1]]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 40))
def test_the_best_are_those_of_a_stable_sort(scores, number):
    scores = torch.tensor([scores, scores[::-1]]) / 1.0
    scores[scores == 3] = -math.inf
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    best, places = _best(scores, number)
    assert torch.equal(best, ordered[:, :number])
    assert torch.equal(places, order[:, :number])


def test_penalties_by_hand():
    """Of 7 tokens, GNMT's is 2^α and the library's 7^α; without α there is none."""
    assert [PENALTIES[name](7, 1.0) for name in ("gnmt", "power")] == [2.0, 7.0]
    assert [PENALTIES[name](7, 0.0) for name in ("gnmt", "power")] == [1.0, 1.0]
    assert PENALTIES["gnmt"](1, 0.6) == 1.0
    assert_close(PENALTIES["gnmt"](25, 0.6), 5**0.6)


def test_texts_that_there_are_not():
    """If every text is one token long, more beams than tokens find no more."""
    model = made(replace(DECODER, vocab_size=4))
    found = beam_search(model, ids(N) % 4, max_new_tokens=2, n_beams=9, stop=range(4), pad=3)
    assert (found.lengths == torch.tensor([1] * 4 + [0] * 5)).all()
    assert (found.scores[:, :4] > -math.inf).all()
    assert (found.scores[:, 4:] == -math.inf).all()
    assert (found.tokens[:, 4:] == 3).all()


# --- the public library


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


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_is_that_of_the_library(name, padded):
    ours, theirs, given, named = theirs_and_ours(name)
    if padded:
        lengths = torch.tensor([9, 4, 7, 2, 8, 1])[:, None]
        both = "source" in given
        mask = torch.arange(9) < lengths if both else torch.arange(9) >= 9 - lengths
        given["source_mask" if both else "prompt_mask"] = mask
        named["attention_mask"] = mask.long()
    free, _ = generate(theirs, named)
    assert torch.equal(greedy(ours, **given, max_new_tokens=12), free)
    stop = telling(free)
    expected, _ = generate(theirs, named, eos_token_id=stop)
    got = greedy(ours, **given, max_new_tokens=12, stop=stop, pad=PAD)
    assert torch.equal(got, expected)
    assert "source" in given or len(set((got != PAD).sum(1).tolist())) > 1


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(
    ("power", "early_stopping"), [(0.0, "never"), (1.0, "never"), (2.0, "never"), (1.0, True)]
)
def test_beams_are_those_of_the_library(name, power, early_stopping):
    ours, theirs, given, named = theirs_and_ours(name)
    stop = [*STOPS, *telling(greedy(ours, **given, max_new_tokens=12))]
    terms = {"length_penalty": power, "early_stopping": early_stopping, "eos_token_id": stop}
    tokens, scores = generate(theirs, named, **terms, num_beams=4, num_return_sequences=4)
    found = beam_search(
        ours,
        **given,
        max_new_tokens=12,
        length_penalty=power,
        penalty="power",
        early_stopping=early_stopping is True,
        stop=stop,
        pad=PAD,
    )
    assert torch.equal(found.tokens.flatten(0, 1), tokens)
    assert_close(found.scores.flatten().float(), scores, atol=1e-4, rtol=1e-4)
    assert power or len(set(found.lengths.flatten().tolist())) > 1


# --- models, modes, dtypes


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_as_it_was(method):
    model = made(replace(DECODER, dropout=0.5))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prompt = ids(N)
    got = METHODS[method](model, prompt, max_new_tokens=2)
    assert not model.training
    assert torch.equal(prompt, ids(N))
    assert_close(model.state_dict(), before)
    assert torch.is_grad_enabled()
    scores = got.scores if method == "beam_search" else got
    assert not scores.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_may_be_trained_on(method):
    """Tensors of inference mode could not."""
    model = made(DECODER)
    got = METHODS[method](model, ids(N), max_new_tokens=3)
    results = got if method == "beam_search" else (got,)
    assert not any(t.is_inference() for t in results)
    model.train()(results[0].flatten(0, -2)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(method, dtype):
    """Log-probabilities are added in float32 at least."""
    model = made(DECODER).to(dtype)
    got = METHODS[method](model, ids(N).int(), max_new_tokens=3)
    tokens = got if method != "beam_search" else got.tokens
    assert tokens.dtype == torch.long
    if method == "beam_search":
        assert got.scores.dtype == torch.float32


def test_log_probabilities_of_half_precision_are_those_of_float32():
    model = made(DECODER).bfloat16()
    with torch.no_grad():
        logits = model(ids(N), mask=torch.ones(B, 1, 1, N).bool())[:, -1]
    found = beam_search(model, ids(N), max_new_tokens=1, n_beams=V, length_penalty=0.0)
    assert_close(found.scores, logits.float().log_softmax(-1).sort(descending=True).values)


# --- what is refused


def refused(*, config=DECODER, method=greedy, training=False, **terms):
    model = made(config).train(training)
    method(model, **{**arguments(model), "max_new_tokens": T, **terms})


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"config": ENCODER}, "the model must be a DecoderLM or an EncoderDecoder; got Encoder"),
        ({"training": True}, "the model must be in eval mode, since dropout would spoil the text"),
        ({"source": ids(M)}, "an EncoderDecoder; got DecoderLM with a source"),
        ({"source_mask": PADDED}, "a source_mask needs a source; got none"),
        ({"config": BOTH, "source": None}, "an EncoderDecoder; got EncoderDecoder without a sou"),
        ({"prompt": ids(N) + 9}, "prompt must lie in 0 <= number < vocab_size (13); got 9 to 21"),
        ({"prompt": ids(N)[:, :0]}, "prompt must be int64 or int32 of shape (batch, length) and"),
        ({"config": BOTH, "source": ids(M) + 9}, "source must lie in 0 <= number < vocab_size"),
        ({"config": BOTH, "source": ids(M)[:2]}, "must have the same batch; got 2 and 3"),
        ({"stop": 13}, "stop and pad must lie in 0 <= number < vocab_size (13); got 13 to 13"),
        ({"stop": 3, "pad": -1}, "stop and pad must lie in 0 <= number < vocab_size (13); got -1"),
        ({"prompt_mask": PADDED.long()}, "prompt_mask must be boolean (True = real token) and sh"),
        ({"prompt_mask": PADDED[:2]}, "shaped like prompt, (3, 6); got torch.bool of shape (2, 6)"),
        ({"prompt_mask": PADDED.flip(1)}, "prompts must be padded on the left, so that the last "),
        ({"prompt_mask": PADDED.flip(1)}, "rows [1, 2] have padding after a token"),
        (
            {"prompt_mask": PADDED & torch.tensor([[True], [False], [True]])},
            "each row of prompt must have a real token; rows [1] have none",
        ),
        (
            {"config": BOTH, "source_mask": torch.zeros(B, M).bool()},
            "each row of source must have a real token; rows [0, 1, 2] have none",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1; got 0"),
        (
            {"max_new_tokens": 0, "method": beam_search},
            "max_new_tokens must be an integer of at least 1; got 0",
        ),
        (
            {"config": CONFIGS["learned"], "max_new_tokens": T + 1},
            "the last must fit into max_seq_len (12); got 6 and 7",
        ),
        (
            {"config": CONFIGS["learned"], "prompt": ids(13), "max_new_tokens": 1},
            "the last must fit into max_seq_len (12); got 13 and 0",
        ),
        ({"method": sample, "temperature": 0.0}, "temperature must be finite and above 0; got 0.0"),
        ({"method": sample, "temperature": 0.0}, "At 0 nothing is left to chance: use greedy"),
        ({"method": sample, "temperature": math.inf}, "must be finite and above 0; got inf"),
        ({"method": sample, "top_p": 0.0}, "top_p must lie in 0 < top_p <= 1; got 0.0"),
        ({"method": sample, "top_p": 1.5}, "top_p must lie in 0 < top_p <= 1; got 1.5"),
        ({"method": sample, "top_k": 0}, "top_k must be an integer from 1 to 13; got 0"),
        ({"method": sample, "top_k": 14}, "top_k must be an integer from 1 to 13; got 14"),
        (
            {"method": beam_search, "n_beams": 0, "max_new_tokens": 9**4},
            "n_beams must be an integer of at least 1; got 0",
        ),
        (
            {"method": beam_search, "n_beams": 14, "max_new_tokens": 1},
            "n_beams must be an integer from 1 to 13; got 14",
        ),
        ({"method": beam_search, "penalty": "length"}, "penalty must be one of gnmt, power; got"),
        ({"method": beam_search, "length_penalty": math.nan}, "length_penalty must be finite; got"),
    ],
)
def test_refusals(terms, message, no_shape_checks):
    with pytest.raises(ValueError, match=re.escape(message)):
        refused(**terms)


def test_a_part_in_training_mode_is_refused_too():
    model = made(DECODER)
    model.stack.blocks[1].train()
    with pytest.raises(ValueError, match="the model must be in eval mode"):
        greedy(model, ids(N), max_new_tokens=T)


def test_there_is_room_for_what_is_just_not_too_long():
    """The last new token is never read, and padding on the left takes no room."""
    model = made(CONFIGS["learned"])
    assert greedy(model, ids(12), max_new_tokens=1).shape == (B, 1)
    mask = torch.arange(20).expand(B, -1) >= 8
    assert greedy(model, ids(20), prompt_mask=mask, max_new_tokens=1).shape == (B, 1)
