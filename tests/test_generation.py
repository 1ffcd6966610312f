"""Generation against plain loops and the public library, and what is refused."""

import re
from dataclasses import replace

import pytest
import torch
from texts import (
    BOTH,
    CONFIGS,
    DECODER,
    ENCODER,
    PAD,
    PADDED,
    PUBLIC,
    B,
    M,
    N,
    T,
    V,
    arguments,
    generate,
    ids,
    log_probs,
    made,
    rows,
    telling,
    theirs_and_ours,
)
from torch.testing import assert_close

from tfm_ref import beam_search, greedy, sample, sampling_probs

METHODS = {
    "greedy": greedy,
    "sample": lambda *args, **terms: sample(
        *args, **terms, top_p=0.9, generator=torch.Generator().manual_seed(0)
    ),
    "beam_search": beam_search,
}


def plain_greedy(model, row, stop=()):
    text = []
    while len(text) < T and (not text or text[-1] not in stop):
        text.append(int(log_probs(model, row, [text])[0].argmax()))
    return text


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


# --- the public library


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


# --- what is refused


def refused(*, config=DECODER, training=False, **terms):
    model = made(config).train(training)
    greedy(model, **{**arguments(model), "max_new_tokens": T, **terms})


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
            {"config": CONFIGS["learned"], "max_new_tokens": T + 1},
            "the last must fit into max_seq_len (12); got 6 and 7",
        ),
        (
            {"config": CONFIGS["learned"], "prompt": ids(13), "max_new_tokens": 1},
            "the last must fit into max_seq_len (12); got 13 and 0",
        ),
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
