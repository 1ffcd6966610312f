"""FlashAttention for the GPU in Triton: read :func:`forward` first; the rest is its derivative.

One program computes one block of rows, and hundreds run at once. Blocks travel between the GPU's
large memory and the small one beside its cores by descriptors (``q.load``, ``o.store``), which
know the shape (batch, heads, length, width) of their tensor: what lies outside is read as 0 and
never written. So a ragged tail, or a width that is no power of two, needs no case of its own.
This module needs Triton; :mod:`tfm_ref.flash_triton` calls it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x log2 e), and 2^x is one instruction
SIZES = ["n_heads", "group", "len_q", "len_k"]  # one compiled program serves all their values


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, o, lse, scale, n_heads, group, len_q, len_k,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute one block of BLOCK_M rows of the output, and the log2 of their softmax sums."""
    # The last rows see the most keys: under the causal mask they start first, so that no long
    # program is left alone at the end.
    block, batch, head = _place(tl.cdiv(len_q, BLOCK_M), n_heads)
    first = (tl.cdiv(len_q, BLOCK_M) - 1 - block) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    queries = q.load([batch, head, first, 0]).reshape(BLOCK_M, WIDTH)

    # The online softmax: for each row the largest score so far, the sum of e^(score - largest),
    # and the values weighted by it. Each new block of keys mends all three.
    state = (
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, WIDTH], tl.float32),
    )
    whole, end = _reach(first, len_q, len_k, CAUSAL, BLOCK_M, BLOCK_N)
    for start in range(0, whole, BLOCK_N):  # every row sees every key of these blocks
        state = _attend(state, queries, k, v, batch, head // group, start, rows, len_q, len_k,
                        scale * LOG2E, False, CAUSAL, BLOCK_N, WIDTH)  # fmt: skip
    for start in range(whole, end, BLOCK_N):  # the diagonal and the tail; beyond them, nothing
        state = _attend(state, queries, k, v, batch, head // group, start, rows, len_q, len_k,
                        scale * LOG2E, True, CAUSAL, BLOCK_N, WIDTH)  # fmt: skip

    # A query without keys has the sum 0. It gives 0, and with log2(sum) = +inf the backward pass
    # finds its weights 2^(score - inf) = 0.
    largest, total, out = state
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    out = out / total[:, None]
    o.store([batch, head, first, 0], out.to(queries.dtype).reshape(1, 1, BLOCK_M, WIDTH))
    sums = tl.where(blind, float("inf"), largest + tl.log2(total))
    tl.store(_of_rows(lse, batch, head, n_heads, rows, len_q), sums, rows < len_q)


@triton.jit
def _attend(
    state, queries, k, v, batch, kv_head, start, rows, len_q, len_k,
    scale2, MASKED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Let the rows attend to the keys from ``start`` on: one step of the online softmax."""
    largest, total, out = state
    keys = k.load([batch, kv_head, start, 0]).reshape(BLOCK_N, WIDTH)
    scores = tl.dot(queries, keys.T, input_precision="ieee")
    if MASKED:
        visible = _visible(rows[:, None], (start + tl.arange(0, BLOCK_N))[None, :],
                           len_q, len_k, CAUSAL)  # fmt: skip
        scores = tl.where(visible, scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1) * scale2)
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        new = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores * scale2 - new[:, None])  # one multiply-add and one power
    old = tl.exp2(largest - new)  # what was summed so far was too large by this factor
    values = v.load([batch, kv_head, start, 0]).reshape(BLOCK_N, WIDTH)
    out = tl.dot(weights.to(values.dtype), values, out * old[:, None], input_precision="ieee")
    return new, total * old + tl.sum(weights, 1), out


@triton.jit
def _visible(rows, columns, len_q, len_k, CAUSAL: tl.constexpr):
    """Say which keys each query sees: those there are, and if causal, none after its own."""
    visible = columns < len_k
    if CAUSAL:  # aligned at the bottom right: the last query sees the last key
        visible = visible & (columns <= rows + len_k - len_q)
    return visible


@triton.jit
def _reach(first, len_q, len_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Give the key where whole blocks end for this block of rows, and where its last key ends."""
    whole, end = len_k, len_k
    if CAUSAL:
        whole = tl.minimum(tl.maximum(first + 1 + len_k - len_q, 0), len_k)
        end = tl.minimum(first + BLOCK_M + len_k - len_q, len_k)
    return whole // BLOCK_N * BLOCK_N, end


@triton.jit
def _place(n_blocks, n_heads):
    """Say who this program is: which block, of which sequence, of which head.

    The programs of one head are neighbours, so that they find its keys in the cache.
    """
    program = tl.program_id(0)
    return program % n_blocks, program // n_blocks // n_heads, program // n_blocks % n_heads


@triton.jit
def _of_rows(numbers, batch, head, n_heads, rows, len_q):
    """Point at one number per row; in 64 bits, lest the product overflow."""
    return numbers + (batch * n_heads + head).to(tl.int64) * len_q + rows


@triton.jit(do_not_specialize=SIZES)
def row_dots(o, do, delta, n_heads, len_q, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Compute ``delta = rowsum(o * do)``, which is also rowsum(weights * dweights)."""
    block, batch, head = _place(tl.cdiv(len_q, BLOCK_M), n_heads)
    first = block * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    product = o.load([batch, head, first, 0]).to(tl.float32) * do.load([batch, head, first, 0])
    dots = tl.sum(product.reshape(BLOCK_M, WIDTH), 1)
    tl.store(_of_rows(delta, batch, head, n_heads, rows, len_q), dots, rows < len_q)


@triton.jit(do_not_specialize=SIZES)
def backward_q(
    q, k, v, do, dq, lse, delta, scale, n_heads, group, len_q, len_k,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute one block of rows of dq: walk over the keys as :func:`forward` does."""
    block, batch, head = _place(tl.cdiv(len_q, BLOCK_M), n_heads)
    first = (tl.cdiv(len_q, BLOCK_M) - 1 - block) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    queries = q.load([batch, head, first, 0]).reshape(BLOCK_M, WIDTH)
    douts = do.load([batch, head, first, 0]).reshape(BLOCK_M, WIDTH)
    here = rows < len_q
    sums = tl.load(_of_rows(lse, batch, head, n_heads, rows, len_q), here, float("inf"))
    dots = tl.load(_of_rows(delta, batch, head, n_heads, rows, len_q), here, 0.0)

    dqueries = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    whole, end = _reach(first, len_q, len_k, CAUSAL, BLOCK_M, BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        dqueries = _add_dq(dqueries, queries, douts, sums, dots, k, v, batch, head // group,
                           start, rows, len_q, len_k, scale * LOG2E, False, CAUSAL,
                           BLOCK_N, WIDTH)  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        dqueries = _add_dq(dqueries, queries, douts, sums, dots, k, v, batch, head // group,
                           start, rows, len_q, len_k, scale * LOG2E, True, CAUSAL,
                           BLOCK_N, WIDTH)  # fmt: skip
    dqueries = (dqueries * scale).to(queries.dtype)
    dq.store([batch, head, first, 0], dqueries.reshape(1, 1, BLOCK_M, WIDTH))


@triton.jit
def _add_dq(
    dqueries, queries, douts, sums, dots, k, v, batch, kv_head, start, rows, len_q, len_k,
    scale2, MASKED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add what one block of keys gives: its weights are computed anew, not read."""
    keys = k.load([batch, kv_head, start, 0]).reshape(BLOCK_N, WIDTH)
    values = v.load([batch, kv_head, start, 0]).reshape(BLOCK_N, WIDTH)
    scores = tl.dot(queries, keys.T, input_precision="ieee")
    if MASKED:
        visible = _visible(rows[:, None], (start + tl.arange(0, BLOCK_N))[None, :],
                           len_q, len_k, CAUSAL)  # fmt: skip
        scores = tl.where(visible, scores, float("-inf"))
    weights = tl.exp2(scores * scale2 - sums[:, None])
    dweights = tl.dot(douts, values.T, input_precision="ieee")
    dscores = weights * (dweights - dots[:, None])  # the derivative of the softmax
    return tl.dot(dscores.to(keys.dtype), keys, dqueries, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def backward_kv(
    q, k, v, do, dk, dv, lse, delta, scale, n_heads, group, len_q, len_k,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute one block of rows of dk and dv: walk over the queries of every head that used it.

    All that falls on one key is summed by one program, in one order: no two ever write to one
    place, and the same input gives the same bits.
    """
    block, batch, kv_head = _place(tl.cdiv(len_k, BLOCK_N), n_heads // group)
    start = block * BLOCK_N
    keys = k.load([batch, kv_head, start, 0]).reshape(BLOCK_N, WIDTH)
    values = v.load([batch, kv_head, start, 0]).reshape(BLOCK_N, WIDTH)

    # From the first block of queries that sees a key here to the last, one head after another.
    # One loop for all of them, with a mask in every block if causal: a second loop would hold
    # more numbers than there are registers, and those that spill are slower than the mask.
    begin = tl.maximum(start + len_q - len_k, 0) // BLOCK_M if CAUSAL else 0
    n_blocks = tl.maximum(tl.cdiv(len_q, BLOCK_M) - begin, 0)
    dkv = tl.zeros([BLOCK_N, WIDTH], tl.float32), tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for step in range(0, group * n_blocks):
        head, first = kv_head * group + step // n_blocks, (begin + step % n_blocks) * BLOCK_M
        dkv = _add_dkv(dkv, keys, values, q, do, lse, delta, batch, head, n_heads, start, first,
                       len_q, len_k, scale * LOG2E, CAUSAL, BLOCK_M, BLOCK_N, WIDTH)  # fmt: skip
    dkeys, dvalues = (dkv[0] * scale).to(keys.dtype), dkv[1].to(keys.dtype)
    dk.store([batch, kv_head, start, 0], dkeys.reshape(1, 1, BLOCK_N, WIDTH))
    dv.store([batch, kv_head, start, 0], dvalues.reshape(1, 1, BLOCK_N, WIDTH))


@triton.jit
def _add_dkv(
    dkv, keys, values, q, do, lse, delta, batch, head, n_heads, start, first, len_q, len_k,
    scale2, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add what one block of queries gives, with all matrices turned: keys are the rows here.

    Keys beyond the last, zeros, get numbers that are never stored; queries beyond the last get
    weights 2^(0 - inf) = 0. So only the diagonal needs a mask.
    """
    columns, rows = start + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_M)
    queries = q.load([batch, head, first, 0]).reshape(BLOCK_M, WIDTH)
    douts = do.load([batch, head, first, 0]).reshape(BLOCK_M, WIDTH)
    here = rows < len_q
    sums = tl.load(_of_rows(lse, batch, head, n_heads, rows, len_q), here, float("inf"))
    dots = tl.load(_of_rows(delta, batch, head, n_heads, rows, len_q), here, 0.0)
    scores = tl.dot(keys, queries.T, input_precision="ieee")
    if MASKED:
        visible = _visible(rows[None, :], columns[:, None], len_q, len_k, True)
        scores = tl.where(visible, scores, float("-inf"))
    weights = tl.exp2(scores * scale2 - sums[None, :])
    dvalues = tl.dot(weights.to(douts.dtype), douts, dkv[1], input_precision="ieee")
    dscores = weights * (tl.dot(values, douts.T, input_precision="ieee") - dots[None, :])
    return tl.dot(dscores.to(queries.dtype), queries, dkv[0], input_precision="ieee"), dvalues
