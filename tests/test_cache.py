"""The cache: what is computed step by step equals what is computed at once."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import redraw, tiny
from small_models import made
from torch.testing import assert_close

from tfm_ref import (
    MODELS,
    DecoderLM,
    EncoderDecoder,
    KVCache,
    MultiHeadAttention,
    RollingCache,
    TransformerConfig,
    attention_maps,
    kv_cache_bytes,
    padding_mask,
    sliding_window_mask,
)
from tfm_ref.backends import BACKENDS
from tfm_ref.config import Latent
from tfm_ref.stack import Stack

SIZES = {"vocab_size": 13, "d_model": 24, "n_layers": 2, "n_heads": 4, "d_ff": 10}
CONFIG = TransformerConfig(**SIZES, positions="alibi", window=4, global_every=2, n_kv_heads=2)
CAUSAL = {name: tiny(m.config) for name, m in MODELS.items() if m.config.is_causal}
SCHEMES = ["none", "learned", "sinusoidal", "rope", "alibi", "t5"]
HEADS = {"MHA": {}, "GQA": {"n_kv_heads": 2}, "MQA": {"n_kv_heads": 1}}
LATENT = Latent(kv_lora_rank=6, rope_head_dim=4, v_head_dim=5, q_lora_rank=7)
B, N, M = 2, 11, 7


def ids(length, seed=0, batch=B):
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(seed))


def runner(model):
    """Run the decoder, whichever it is, from tokens to logits."""
    if isinstance(model, DecoderLM):
        return model
    context = model.encode(ids(M, 1))
    return lambda tokens, **terms: model.decode(tokens, context, **terms)


def in_chunks(model, tokens, sizes, **choices):
    """Run a sequence piece by piece, with a cache that it just fills."""
    run, cache = runner(model), model.new_cache(tokens.shape[1], **choices)
    logits = [run(piece, cache=cache) for piece in tokens.split(sizes, 1)]
    assert cache.length == tokens.shape[1]
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_every_model_of_the_zoo_gives_the_same_with_a_cache(name):
    model, tokens = made(CAUSAL[name]), ids(N)
    expected = runner(model)(tokens)
    for sizes in [1] * N, [4, 1, 6], [N]:
        assert_close(in_chunks(model, tokens, sizes)[0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("positions", SCHEMES)
@pytest.mark.parametrize("n_encoder_layers", [0, 1])
@torch.no_grad()
def test_every_scheme_gives_the_same_for_every_split(n_encoder_layers, positions, kind):
    config = TransformerConfig(
        **SIZES,
        **HEADS[kind],
        positions=positions,
        max_seq_len=N,
        n_encoder_layers=n_encoder_layers,
    )
    model, tokens = made(config), ids(N)
    expected = runner(model)(tokens)
    for first in range(1, N):
        assert_close(in_chunks(model, tokens, [first, N - first])[0], expected, atol=1e-10, rtol=0)


SPLITS = st.lists(st.integers(1, 5), min_size=1, max_size=6)
WINDOWS = {"sliding": {}, "two first": {"n_first": 2}, "chunked": {"chunked": True}}
WINDOWS |= {"one": {"window": 1}, "all first": {"window": 1, "n_first": 30}}


@pytest.mark.parametrize("kind", [*HEADS, "MLA"])
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("window", WINDOWS)
@given(SPLITS, st.booleans())
@settings(max_examples=20)
@torch.no_grad()
def test_windows_give_the_same_for_every_split(window, positions, kind, sizes, rolling):
    heads = HEADS | {"MLA": {"latent": LATENT, "head_dim": 4, "positions": "rope"}}
    choices = {"n_kv_heads": None, "positions": positions, **heads[kind], **WINDOWS[window]}
    model, tokens = made(replace(CONFIG, **choices)), ids(sum(sizes))
    logits, cache = in_chunks(model, tokens, sizes, rolling=rolling)
    assert_close(logits, model(tokens), atol=1e-10, rtol=0)
    kinds = RollingCache if rolling else KVCache, KVCache
    assert tuple(type(own) for own, _ in cache.layers) == kinds


@pytest.mark.parametrize("window", WINDOWS)
@given(SPLITS.filter(lambda sizes: sum(sizes) > 3), st.data())
@settings(max_examples=20)
@torch.no_grad()
def test_windows_and_padding_on_the_left_give_the_same_for_every_split(window, sizes, data):
    """Padding may fall out of the window; positions are those of the uncached model."""
    n = sum(sizes)
    model, tokens = made(replace(CONFIG, positions="rope", **WINDOWS[window])), ids(n)
    lengths = torch.tensor([n, data.draw(st.integers(1, n))])
    mask = padding_mask(lengths, n, side="left")
    places = (torch.arange(n) - (n - lengths)[:, None]).clamp(min=0)
    cache, logits, end = model.new_cache(n), [], 0
    for size in sizes:
        start, end = end, end + size
        terms = {"mask": mask[..., :end], "positions": places[:, start:end]}
        logits.append(model(tokens[:, start:end], **terms, cache=cache))
    expected, real = model(tokens, mask=mask, positions=places), mask[:, 0, 0]
    assert_close(torch.cat(logits, 1)[real], expected[real], atol=1e-10, rtol=0)
    if WINDOWS[window].get("n_first"):
        return
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, n - length :])[0]
        assert_close(expected[row, n - length :], alone, atol=1e-10, rtol=0)


@given(st.integers(1, 5), st.integers(0, 3), SPLITS, st.booleans())
@torch.no_grad()
def test_one_layer_with_a_rolling_cache_has_the_window_as_its_mask(window, n_first, sizes, bound):
    """The last keys of a window by hand: no off-by-one hides in a mask that both sides share."""
    attention = redraw(MultiHeadAttention(d_model=8, n_heads=2)).double()
    length = sum(sizes)
    x = torch.randn(B, length, 8, dtype=torch.float64)
    cache = RollingCache(window, n_first=n_first, max_len=length if bound else None)
    start = 0
    for piece in x.split(sizes, 1):
        end = start + piece.shape[1]
        columns = cache.columns(end - start)
        mask = sliding_window_mask(end - start, end, window=window, n_first=n_first)
        mask = mask if columns is None else mask[..., columns]
        if end - start == 1 and columns is not None:
            assert mask.all()
        y = attention(piece, is_causal=True, mask=mask, cache=cache)
        for i in range(start, end):
            seen = [j for j in range(i + 1) if j > i - window or j < n_first]
            alone = attention(x[:, i : i + 1], x[:, seen])
            assert_close(y[:, i - start : i - start + 1], alone, atol=1e-10, rtol=0)
        start = end
    slots = min(length, window + n_first) if bound else window + n_first
    assert cache.n_bytes == B * slots * attention.cache_width * 8


# --- bugs that others had


@torch.no_grad()
def test_a_cache_that_is_reset_begins_anew():
    """The pointer goes back, the room is taken anew, positions and a context are forgotten."""
    for config in CONFIG, TransformerConfig(**SIZES, n_encoder_layers=1):
        model, cache = made(config), None
        for batch in B, 3:
            tokens, source = ids(N, batch, batch), ids(M, 7 + batch, batch)
            args = [model.encode(source)] if config.n_encoder_layers else []
            run = model.decode if config.n_encoder_layers else model
            cache = model.new_cache(N) if cache is None else cache
            cache.reset()
            assert (cache.length, cache.n_bytes) == (0, 0)
            steps = [run(t, *args, cache=cache) for t in tokens.split([6, 1, 4], 1)]
            assert_close(torch.cat(steps, 1), run(tokens, *args), atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_window_counts_the_token_itself():
    """What stands before the window changes nothing, its first token does."""
    model, tokens = made(replace(CONFIG, n_layers=1, global_every=None)), ids(N)
    for column, is_seen in (N - 4, True), (N - 5, False):
        other = tokens.clone()
        other[:, column] = (other[:, column] + 1) % 13
        for sizes in [1] * N, [N], [6, 5]:
            last, changed = (in_chunks(model, t, sizes)[0][:, -1] for t in (tokens, other))
            assert torch.allclose(last, changed, atol=1e-10) != is_seen


@torch.no_grad()
def test_a_second_chunk_is_causal_and_has_its_window():
    """Its first token sees none of the later ones, and what a first call would show it."""
    for config in CONFIG, replace(CONFIG, window=None, global_every=None, positions="rope"):
        model, tokens = made(config), ids(N)
        other = tokens.clone()
        other[:, 7:] = (other[:, 7:] + 1) % 13
        expected = model(tokens)
        for t in tokens, other:
            cache = model.new_cache(N)
            model(t[:, :5], cache=cache)
            logits = model(t[:, 5:], cache=cache)
            assert_close(logits[:, :2], expected[:, 5:7], atol=1e-10, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_one_query_is_aligned_with_the_last_key(backend):
    """Aligned at the top left, it would see the first key alone."""
    attention = redraw(MultiHeadAttention(d_model=8, n_heads=4, n_kv_heads=2, backend=backend))
    x, cache = torch.randn(B, N, 8), KVCache(N)
    attention(x[:, :-1], is_causal=True, cache=cache)
    last = attention(x[:, -1:], is_causal=True, cache=cache)
    assert_close(last, attention(x[:, -1:], x))


# ---


@torch.no_grad()
def test_what_a_window_has_forgotten_cannot_be_said_anew():
    """One token back is always possible, and all the way back; between, tokens are missing."""
    model, tokens = made(replace(CONFIG, n_first=2)), ids(N)
    expected, cache = in_chunks(model, tokens, [3, N - 3])
    cache.truncate(N - 1)
    for _ in range(2):
        for length in N - 2, 3:
            message = (
                "the cache has forgotten tokens 2 to 6, and its window is 4: the length "
                f"must be at most 2 or at least 10; got {length}"
            )
            with pytest.raises(ValueError, match=re.escape(message)):
                cache.truncate(length)
            assert {own.length for own in cache} == {N - 1}
    assert_close(model(tokens[:, -1:], cache=cache), expected[:, -1:], atol=1e-10, rtol=0)
    for length in 2, 0:
        cache.truncate(length)
        rest = [model(t, cache=cache) for t in tokens[:, length:].split(5, 1)]
        assert_close(torch.cat(rest, 1), expected[:, length:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("n_first", [0, 1])
@torch.no_grad()
def test_a_window_that_is_not_yet_full_has_forgotten_nothing(n_first):
    cache = RollingCache(5, n_first=n_first)
    cache.append(torch.arange(5.0).view(1, 5, 1))
    cache.truncate(2)
    seen = cache.append(torch.tensor([[[7.0]]]))[0]
    assert seen.flatten().tolist() == [0, 1, 7]


@torch.no_grad()
def test_a_window_that_begins_anew_has_forgotten_nothing():
    cache = RollingCache(2, n_first=3)
    for token in torch.arange(10.0).view(10, 1, 1, 1):
        cache.append(token)
    cache.truncate(2)
    cache.append(torch.tensor([[[7.0], [8.0], [9.0]]]))
    cache.truncate(4)
    assert cache.tensors[0].flatten().tolist() == [0, 1, 7, 8]
    with pytest.raises(ValueError, match="length must be an integer from 0 to 4; got 5"):
        cache.truncate(5)


@torch.no_grad()
def test_what_is_refused_is_not_remembered():
    cache, t = KVCache(3), torch.zeros(1, 2, 4)
    for wrong in (), (t, t[:, :1]), (torch.zeros(1, 4, 4),):
        with pytest.raises(ValueError, match=r"at least one|expects shape|has room for 3"):
            cache.append(*wrong)
        assert (cache.length, cache.n_bytes) == (0, 0)


@torch.no_grad()
def test_a_rolling_cache_has_no_end_if_none_is_given():
    attention, cache = redraw(MultiHeadAttention(d_model=8, n_heads=2)), RollingCache(3, n_first=1)
    x = torch.randn(1, 50, 8)
    for token in x.split(1, 1):
        y = attention(token, cache=cache)
    assert_close(y, attention(x[:, -1:], x[:, [0, 47, 48, 49]]))
    assert (cache.length, cache.n_bytes) == (50, 4 * 16 * 4)


@pytest.mark.parametrize("positions", SCHEMES)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing_of_the_rest(positions):
    config = TransformerConfig(**SIZES, positions=positions, max_seq_len=N)
    model, tokens, lengths = made(config), ids(N), torch.tensor([N, N - 4])
    mask = padding_mask(lengths, N, side="left")
    places = (torch.arange(N) - (N - lengths)[:, None]).clamp(min=0)
    cache, logits = model.new_cache(N), []
    for start, end in (0, 6), (6, 7), (7, N):
        terms = {"mask": mask[..., :end], "positions": places[:, start:end]}
        logits.append(model(tokens[:, start:end], **terms, cache=cache))
    logits = torch.cat(logits, 1)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, N - length :])
        assert_close(logits[row : row + 1, N - length :], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, window=None, global_every=None)])
@pytest.mark.parametrize("n_encoder_layers", [0, 2])
@torch.no_grad()
def test_rows_are_reordered_dropped_and_doubled(config, n_encoder_layers):
    if n_encoder_layers:
        config = replace(config, window=None, global_every=None, n_encoder_layers=n_encoder_layers)
    model, tokens = made(config), ids(N, batch=3)
    context = model.encode(ids(M, 1, batch=3)) if n_encoder_layers else None

    def run(t, rows, **terms):
        return model.decode(t, context[rows], **terms) if n_encoder_layers else model(t, **terms)

    cache, everything = model.new_cache(N), torch.arange(3)
    run(tokens[:, :5], everything, cache=cache)
    for indices in torch.tensor([2, 0, 0, 1]), torch.tensor([3, 1]):
        tokens, everything = tokens[indices], everything[indices]
        cache.reorder(indices)
    logits = run(tokens[:, 5:], everything, cache=cache)
    assert_close(logits, run(tokens, everything)[:, 5:], atol=1e-10, rtol=0)


@torch.no_grad()
def test_what_is_forgotten_can_be_said_anew():
    for config in CONFIG, TransformerConfig(**SIZES, n_encoder_layers=1):
        model, tokens = made(replace(config, window=None, global_every=None)), ids(N)
        expected, cache = in_chunks(model, tokens, [3, N - 3])
        cache.truncate(4)
        again = runner(model)(tokens[:, 4:], cache=cache)
        assert_close(again, expected[:, 4:], atol=1e-10, rtol=0)
        with pytest.raises(ValueError, match=re.escape(f"from 0 to {N}; got {N + 1}")):
            cache.truncate(N + 1)


@torch.no_grad()
def test_a_call_that_failed_leaves_nothing():
    """With a window that is full, if it was a step of one token."""
    for config in CONFIG, replace(CONFIG, positions="rope", window=None, global_every=None):
        model, tokens = made(config), ids(N)
        cache = model.new_cache(N)
        model(tokens[:, :6], cache=cache)
        second = model.stack.blocks[1].attention
        handle = second.register_forward_pre_hook(lambda *_: 1 / 0)
        for size in 1, 5:
            with pytest.raises(ZeroDivisionError):
                model(tokens[:, 6 : 6 + size], cache=cache)
            assert cache.length == 6
        handle.remove()
        if config is CONFIG:
            with pytest.raises(ValueError, match=r"forgotten tokens 0 to 6, .* got 6"):
                model(tokens[:, 6:], cache=cache)
            continue
        logits = model(tokens[:, 6:], cache=cache)
        assert_close(logits, model(tokens)[:, 6:], atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_step_that_failed_can_be_repeated():
    model, tokens = made(CONFIG), ids(N)
    cache = model.new_cache(N)
    model(tokens[:, : N - 1], cache=cache)
    handle = model.stack.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(tokens[:, -1:], cache=cache)
    handle.remove()
    last = model(tokens[:, -1:], cache=cache)
    assert_close(last, model(tokens)[:, -1:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_cache_takes_the_memory_that_is_said(name):
    """With a window, no more, whether the tokens come at once or one by one."""
    model = made(CAUSAL[name])
    source = M if isinstance(model, EncoderDecoder) else 0
    for length, sizes in (N, [N]), (N, [1] * N), (2, [1, 1]):
        cache = in_chunks(model, ids(length), sizes)[1]
        said = kv_cache_bytes(model, length, source_length=source, bytes_per_number=8)
        assert cache.n_bytes == B * said


@torch.no_grad()
def test_nothing_is_copied_again():
    cache = KVCache(max_len=3)
    first = cache.append(torch.zeros(1, 2, 1, 4))[0]
    second = cache.append(torch.ones(1, 2, 2, 4))[0]
    assert first.data_ptr() == second.data_ptr()
    assert cache.n_bytes == 2 * 3 * 4 * 4
    assert_close(second[0, 0, :, 0], torch.tensor([0.0, 1.0, 1.0]))


@torch.no_grad()
def test_maps_of_attention_are_shown_and_nothing_is_remembered_twice():
    for config in CONFIG, TransformerConfig(**SIZES, n_encoder_layers=1):
        model, tokens = made(config), ids(N)
        stack = model.stack if isinstance(model, DecoderLM) else model.decoder
        args = [] if isinstance(model, DecoderLM) else [model.encode(ids(M, 1))]
        x, cache = model.embedding(tokens), model.new_cache(N)
        whole = attention_maps(stack, x, *args)
        attention_maps(stack, x[:, :4], *args, cache=cache)
        seen = [own.columns(N - 4) for own, _ in cache.layers]
        rest = attention_maps(stack, x[:, 4:], *args, cache=cache)
        assert cache.length == N
        for name, weights in whole.items():
            layer, kind = re.search(r"(\d+)\.(\w+)", name).groups()
            columns = seen[int(layer)] if kind == "attention" else None
            weights = weights[:, :, 4:] if columns is None else weights[:, :, 4:, columns]
            assert_close(rest[name], weights, atol=1e-10, rtol=0)


@torch.no_grad()
def test_autocast_remembers_in_half_precision():
    model, tokens = made(CONFIG).float(), ids(N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.new_cache(N)
        logits = torch.cat([model(t, cache=cache) for t in tokens.split(1, 1)], 1)
        assert_close(logits, model(tokens), atol=0.1, rtol=0.05)
    assert cache.n_bytes == B * kv_cache_bytes(model, N)


# --- what is refused


@torch.no_grad()
def test_bad_input_is_refused(no_shape_checks):
    for max_len in 0, 2.5:
        with pytest.raises(ValueError, match=rf"max_len must .* at least 1; got {max_len}"):
            KVCache(max_len)
    for terms in {"window": 0}, {"window": 2.5}, {"window": 2, "max_len": 0}:
        with pytest.raises(ValueError, match=r"(window|max_len) must .* at least 1; got (0|2.5)"):
            RollingCache(**terms)
    with pytest.raises(ValueError, match=r"n_first must .* at least 0; got -1"):
        RollingCache(2, n_first=-1)
    with pytest.raises(ValueError, match="n_layers must"):
        type(made(CONFIG).new_cache(3))([], 3)

    model = made(CONFIG)
    cache = model.new_cache(5)
    model(ids(4), cache=cache)
    with pytest.raises(ValueError, match=re.escape("the cache has room for 5 tokens; got 4 + 2")):
        model(ids(2), cache=cache)
    assert cache.length == 4
    with pytest.raises(ValueError, match=re.escape("expects shape (2, 1, 1)")):
        model(ids(1, batch=3), cache=cache)

    layer = KVCache(4)
    layer.append(torch.zeros(1, 2, 1, 4))
    message = "the cache holds torch.float32 and expects shape (1, 2, 1, 4); got torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.append(torch.zeros(1, 2, 1, 4).double())
    assert layer.length == 1

    encoder = Stack(TransformerConfig(**SIZES, is_causal=False))
    with pytest.raises(ValueError, match="needs is_causal = True"):
        encoder(torch.zeros(1, 2, 24), cache=cache)


def test_gradients_are_refused():
    model = made(CONFIG)
    with pytest.raises(ValueError, match=re.escape("under torch.no_grad()")):
        model(ids(3), cache=model.new_cache(3))


@torch.no_grad()
def test_another_context_is_refused():
    attention, cache = MultiHeadAttention(d_model=8, n_heads=2), KVCache()
    x, context = torch.zeros(2, 1, 8), torch.zeros(2, 5, 8)
    attention(x, context, cache=cache)
    for shape in (2, 6, 8), (3, 5, 8):
        message = f"a context of batch 2 and length 5; got one of shape {shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            attention(torch.zeros(shape[0], 1, 8), torch.zeros(shape), cache=cache)
