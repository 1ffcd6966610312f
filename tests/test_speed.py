"""Speed on one thread of the CPU, where it can as a ratio. `make bench` prints it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from time import process_time

import pytest
import stopwatch

from tfm_ref import corpus, train_bpe


@pytest.mark.parametrize(("length", "least"), [(512, 1.4), (1024, 2.0)])
def test_multi_head_attention_against_torch_module(length, least):
    """The base model's layer, batch 8, causal, float32, forward; theirs as it is by default."""
    for _ in range(3):  # a busy machine may spoil a measurement
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            gain, plain = fresh.submit(stopwatch.multi_head_attention, length).result()
        if gain >= least:
            break
    what = f"nn.MultiheadAttention / MultiHeadAttention, causal, N = {length}"
    print(f"\n{what}: {gain:.2f} (at least {least}); need_weights=False: {plain:.2f}")
    assert gain >= least


def test_bpe_training():
    """1,000 merges on the corpus, in time of one core."""
    start = process_time()
    tokenizer = train_bpe(corpus(), n_merges=1000)
    seconds = process_time() - start
    print(f"\ntrain_bpe, 1,000 merges on the corpus: {seconds:.2f} s (at most 5)")
    assert tokenizer.vocab_size == 1256
    assert seconds < 5
