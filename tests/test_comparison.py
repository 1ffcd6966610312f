"""What candidates are compared on."""

import pytest
import torch

from tfm_ref import comparison


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300, 1024])
def test_rows_that_are_compared_are_few_and_spread(n):
    rows = comparison._asking_rows(torch.empty(1, 1, n, 1)).tolist()
    step = -(-n // 128)
    assert len(rows) == -(-n // step) <= 128
    assert rows[-1] == n - 1
    assert rows[0] < step
    assert rows == sorted(set(rows))


def test_the_gradient_asked_for_is_the_same_in_every_dtype():
    exact = comparison.asked(torch.empty(3, 7, dtype=torch.float64))
    assert set(exact.flatten().tolist()) == {-2, -1, 0, 1, 2}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(comparison.asked(torch.empty(3, 7, dtype=dtype)).double(), exact)
