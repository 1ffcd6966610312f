"""The learning rate by hand, and in PyTorch's scheduler."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tfm_ref import noam_lr


def test_the_schedule_by_hand():
    lr = partial(noam_lr, d_model=16, warmup=4)
    assert_close([lr(step) for step in (1, 2, 4, 16)], [1 / 32, 1 / 16, 1 / 8, 1 / 16])
    assert lr(9, factor=3.0) == 3 * lr(9)
    assert noam_lr(7, d_model=512) == noam_lr(7, d_model=512, warmup=4000)
    rates = [noam_lr(step, d_model=512, warmup=50) for step in range(1, 300)]
    assert max(rates) == rates[49] == 512**-0.5 * 50**-0.5


def test_the_schedule_in_lambda_lr():
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters(), lr=1.0)
    lr = partial(noam_lr, d_model=8, warmup=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr(i + 1))
    for step in range(1, 8):
        assert optimizer.param_groups[0]["lr"] == lr(step)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("wrong", ["step", "d_model", "warmup"])
def test_the_schedule_refuses(wrong):
    terms = {"step": 1, "d_model": 1, "warmup": 1} | {wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong} must be an integer of at least 1; got 0"):
        noam_lr(**terms)
