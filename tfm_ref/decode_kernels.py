"""Attention for decoding in Triton: few queries, many keys, and all the time goes into reading.

One program takes a slice of the keys and all queries that need them: those of every head that
shares the key head, and of every new token, are rows of one tile, so that each key is read once.
Slices are many, or most of the GPU would idle; a second kernel joins what they found.
This module needs Triton; :mod:`tfm_ref.decode_triton` calls it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x log2 e), and 2^x is one instruction


@triton.jit(do_not_specialize=["len_q", "len_k", "n_splits", "window"])
def attend_slice(
    q, k, v, lengths, part, lse, scale, len_q, len_k, n_splits, window, n_rows,
    qb, qh, qn, kb, kg, km, vb, vg, vm,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Attend to one slice of the keys: give the average of its values, and log2 of its sum.

    A key has K numbers and a value V. Where the value is the beginning of the key (SHARED: the
    latent of MLA), the key is taken as two tiles, and the first of them serves for both.
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_kv_heads = tl.num_programs(1)
    tile = split // n_splits  # with very many rows, several programs share the slice
    split = split % n_splits
    row = tile * ROWS + tl.arange(0, ROWS)  # the queries of one head, then those of the next
    here = row < n_rows
    head, query = kv_head * GROUP + row // len_q, row % len_q
    length = len_k
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + batch).to(tl.int32), len_k)
    last = length - 1  # the last key that each row sees
    if CAUSAL:
        last = length - len_q + query
    first = tl.maximum(last - window + 1, 0)

    # The keys that any row sees, in blocks, and of these my share.
    begin = tl.maximum(length - len_q - window + 1 if CAUSAL else length - window, 0)
    begin = begin // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), BLOCK_N), n_splits) * BLOCK_N
    begin += split * share
    end = tl.minimum(begin + share, length)

    main, rest = tl.arange(0, MAIN), V + tl.arange(0, REST)
    q += batch * qb + head[:, None] * qh + query[:, None] * qn
    k += batch * kb + kv_head.to(tl.int64) * kg
    v += batch * vb + kv_head.to(tl.int64) * vg
    queries = tl.load(q + main[None, :], here[:, None] & (main[None, :] < tl.minimum(K, V)), 0.0)
    if K > V:
        others = tl.load(q + rest[None, :], here[:, None] & (rest[None, :] < K), 0.0)
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, MAIN], tl.float32)
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        there, key = (column < end)[:, None], k + column[:, None].to(tl.int64) * km
        keys = tl.load(key + main[None, :], there & (main[None, :] < tl.minimum(K, V)), 0.0)
        scores = tl.dot(queries, keys.T, input_precision="ieee")
        if K > V:
            more = tl.load(key + rest[None, :], there & (rest[None, :] < K), 0.0)
            scores = tl.dot(others, more.T, scores, input_precision="ieee")
        if SHARED:
            values = keys
        else:
            value = v + column[:, None].to(tl.int64) * vm
            values = tl.load(value + main[None, :], there & (main[None, :] < V), 0.0)
        # The online softmax, as in tfm_ref/flash_kernels.py.
        column = column[None, :]
        visible = (column <= last[:, None]) & (column >= first[:, None])
        scores = tl.where(visible, scores * (scale * LOG2E), float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        weights, old = tl.exp2(scores - safe[:, None]), tl.exp2(largest - safe)
        total = total * old + tl.sum(weights, 1)
        out = tl.dot(weights.to(values.dtype), values, out * old[:, None], input_precision="ieee")
        largest = new

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    place = ((batch * n_kv_heads + kv_head) * n_rows + row) * n_splits + split
    tl.store(lse + place, tl.where(blind, float("-inf"), largest + tl.log2(total)), here)
    spot = part + place[:, None] * V + main[None, :]
    tl.store(spot, out / total[:, None], here[:, None] & (main[None, :] < V))


@triton.jit(do_not_specialize=["n_splits"])
def join_slices(part, lse, o, n_splits, V: tl.constexpr, WIDTH: tl.constexpr):
    """Average what the slices found for one row, each by its share of the sum of all."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    largest, total = float("-inf"), 0.0
    out = tl.zeros([WIDTH], tl.float32)
    for split in range(0, n_splits):
        sums = tl.load(lse + row * n_splits + split)
        found = tl.load(part + (row * n_splits + split) * V + column, column < V, 0.0)
        new = tl.maximum(largest, sums)
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight, old = tl.exp2(sums - safe), tl.exp2(largest - safe)
        total, out, largest = total * old + weight, out * old + found * weight, new
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(o + row * V + column, out.to(o.dtype.element_ty), column < V)
