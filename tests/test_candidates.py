"""Candidates and their sizes: what they compute, and what is counted of them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tfm_ref import candidates
from tfm_ref.candidates import Setting

SMALL = Setting(2, 4, 2, 40, 40, 16, True, "float32")


def test_operations_and_bytes_are_counted(device):
    setting = SMALL._replace(is_causal=False)
    inputs = [t.detach() for t in setting.draw(device)]
    with FlopCounterMode(display=False) as counter:
        candidates.ATTENTIONS["naive"](*inputs)
    assert counter.get_total_flops() == setting.flops == 2 * SMALL.flops
    assert sum(t.nbytes for t in inputs[1:]) == setting.kv_bytes
    assert setting._replace(dtype="bfloat16").kv_bytes == setting.kv_bytes // 2


def test_a_latent_is_key_and_value(device):
    setting = SMALL._replace(n_kv_heads=1, head_dim=24, latent=16, is_causal=False)
    q, k, v = (t.detach() for t in setting.draw(device))
    assert v.data_ptr() == k.data_ptr()
    assert (k.shape[-1], v.shape[-1]) == (24, 16)
    assert k.nbytes == setting.kv_bytes
    with FlopCounterMode(display=False) as counter:
        candidates.ATTENTIONS["naive"](q, k, v)
    assert counter.get_total_flops() == setting.flops


def test_flex_attention_sees_what_the_others_see(device, monkeypatch):
    monkeypatch.setattr(candidates, "_flex_compiled", lambda: candidates.flex_attention)
    setting = SMALL._replace(len_q=4096, len_k=4096, batch=1, n_kv_heads=8, n_heads=8)
    assert setting.suits("flex")
    assert not SMALL.suits("flex")
    small = setting._replace(len_q=160, len_k=160)
    q, k, v = (t.detach() for t in small.draw(device))
    expected = candidates.ATTENTIONS["naive"](q, k, v, is_causal=True)
    with pytest.warns(UserWarning, match="without torch.compile"):
        found = candidates.flex(q, k, v, is_causal=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
