"""The zoo: counts against those computed elsewhere, and every model, made tiny, behaves."""

import re
import time

import pytest
import torch
from oracles import redraw, tiny
from torch.testing import assert_close

from tfm_ref import (
    MODELS,
    attention_maps,
    build,
    count_parameters,
    full_size,
    kv_cache_bytes,
    padding_mask,
)
from tfm_ref.latent import LatentAttention
from tfm_ref.moe import MoELayer

# Counted from configs by formulas that share nothing with this package: parameters, those active
# per token without a table that is only looked up, in millions, and KiB of cache per token. An
# encoder keeps no cache; its count leaves out what stands before its logits.
COUNTED = {
    "Transformer-base": (63_045_632, 63.0, 12.0),
    "Transformer-big": (214_171_648, 214.2, 24.0),
    "GPT-2 small": (124_439_808, 124.4, 36.0),
    "GPT-2 medium": (354_823_168, 354.8, 96.0),
    "GPT-2 large": (774_030_080, 774.0, 180.0),
    "GPT-2 XL": (1_557_611_200, 1557.6, 300.0),
    "GPT-3 175B": (174_604_259_328, 174_604.3, 4608.0),
    "BERT-base": (109_482_240, 109.5, None),
    "BERT-large": (335_141_888, 335.1, None),
    "RoBERTa-base": (124_055_040, 124.1, None),
    "RoBERTa-large": (354_310_144, 354.3, None),
    "T5-small": (60_506_624, 60.5, 12.0),
    "T5-base": (222_903_552, 222.9, 36.0),
    "T5-large": (737_668_096, 737.7, 96.0),
    "T5-3B": (2_851_598_336, 2851.6, 384.0),
    "T5-11B": (11_307_321_344, 11_307.3, 1536.0),
    "BART-large": (406_291_456, 406.3, 48.0),
    "BLOOM-176B": (176_247_271_424, 176_247.3, 3920.0),
    "MPT-7B": (6_649_286_656, 6649.3, 512.0),
    "PaLM-540B": (540_356_474_880, 540_356.5, 118.0),
    "Llama-1-7B": (6_738_415_616, 6607.3, 512.0),
    "Llama-2-7B": (6_738_415_616, 6607.3, 512.0),
    "Llama-2-13B": (13_015_864_320, 12_852.0, 800.0),
    "Llama-2-70B": (68_976_648_192, 68_714.5, 320.0),
    "Llama-3-8B": (8_030_261_248, 7504.9, 128.0),
    "Llama-3-70B": (70_553_706_496, 69_503.0, 320.0),
    "Llama-3.1-405B": (405_853_388_800, 403_752.0, 504.0),
    "Mistral-7B-v0.1": (7_241_732_096, 7110.7, 128.0),
    "Qwen2.5-7B": (7_615_616_512, 7070.6, 56.0),
    "Qwen3-8B": (8_190_735_360, 7568.4, 144.0),
    "DeepSeek-LLM-67B": (67_425_001_472, 66_586.1, 380.0),
    "Gemma-2-2B": (2_614_341_888, 2614.3, 104.0),
    "Gemma-2-9B": (9_241_705_984, 9241.7, 336.0),
    "Gemma-2-27B": (27_227_128_320, 27_227.1, 368.0),
    "Gemma-3-1B": (999_885_952, 999.9, 26.0),
    "Gemma-3-12B": (11_765_788_416, 11_765.8, 384.0),
    "Gemma-3-27B": (27_009_002_240, 27_009.0, 496.0),
    "Mixtral-8x7B": (46_702_792_704, 12_748.8, 128.0),
    "Mixtral-8x22B": (140_620_634_112, 38_955.5, 224.0),
    "Qwen3-235B-A22B": (235_093_634_560, 21_568.5, 188.0),
    "Llama-4-Scout": (107_769_861_120, 16_138.2, 192.0),
    "gpt-oss-120b": (116_829_156_672, 5132.8, 72.0),
    "DeepSeek-V2": (235_741_434_880, 20_851.7, 67.5),
    "DeepSeek-V3": (671_026_404_352, 36_625.6, 68.625),
}
ENCODERS = [name for name, (_, _, cache) in COUNTED.items() if cache is None]


def size(stated: str) -> tuple[float, float]:
    """Read a number as makers write it, and by how much its last digit may be rounded."""
    number, unit = re.fullmatch(r"([\d.,]+)([MB]?)", stated).groups()
    digits = len(number.partition(".")[2])
    scale = {"M": 1e6, "B": 1e9, "": 1}[unit]
    return float(number.replace(",", "")) * scale, 0.5 * scale * 10**-digits


def head_only(name: str) -> int:
    """Count what stands between an encoder and its logits, without the matrix that is tied."""
    head = full_size(name).head
    return sum(p.numel() for n, p in head.named_parameters() if n != "proj.weight")


def test_every_model_is_counted():
    assert COUNTED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_counts_and_time(name):
    total, active, cache = COUNTED[name]
    start = time.process_time()
    model = full_size(name)
    count = count_parameters(model)
    assert time.process_time() - start < 2
    head = head_only(name) if name in ENCODERS else 0
    assert count.total - head == total
    assert_close((count.active_without_lookup - head) / 1e6, active, atol=0.6, rtol=0)
    if cache is not None:
        assert kv_cache_bytes(model) == cache * 1024


# Where the number that makers state is not the number of parameters, rounded.
NOT_AS_STATED = {
    "Transformer-base",  # 63.0M at 37,000 tokens, stated 65M
    "Transformer-big",  # 214.2M, stated 213M
    "GPT-2 XL",  # 1558M, stated 1.5B
    "BERT-large",  # 336M with its head, stated 340M
    "T5-base",  # 223M, stated 220M
    "T5-large",  # 738M, stated 770M
    "T5-small",  # 60.5M, stated 60M
    "BART-large",  # 406M, stated 400M
    "Llama-2-70B",  # 69.0B, stated 70B
    "Llama-3-70B",  # 70.6B, stated 70B
    "Llama-3.1-405B",  # 405.9B, stated 405B
    "PaLM-540B",  # 540.356B, stated 540.35B
    "Qwen2.5-7B",  # 7.616B, stated 7.61B
    "Llama-4-Scout",  # 107.8B without the vision encoder, stated 109B with it
}


@pytest.mark.parametrize("name", MODELS)
def test_stated_sizes(name):
    stated, rounding = size(MODELS[name].stated)
    total = count_parameters(full_size(name)).total
    assert (abs(total - stated) <= 1.001 * rounding) != (name in NOT_AS_STATED)
    assert abs(total / stated - 1) < 0.06


@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if m.stated_active])
def test_stated_active_sizes(name):
    """One of the two ways to count gives the number that is stated."""
    stated, rounding = size(MODELS[name].stated_active)
    count = count_parameters(full_size(name))
    ways = count.active, count.active_without_lookup
    assert min(abs(way - stated) for way in ways) <= 1.001 * rounding
    assert count.active < count.total


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="name must be one of Transformer-base, Transformer-b"):
        full_size("GPT-5")


def test_every_model_has_a_source():
    for name, model in MODELS.items():
        assert len(model.source) > 10, name
        assert model.stated, name


# --- every model, made tiny


TINY = {name: redraw(build(tiny(model.config))).double().eval() for name, model in MODELS.items()}
B, N = 4, 7


def ids(seed=0):
    return torch.randint(0, 13, (B, N), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, **terms):
    """Run a model of any kind; of two stacks, the second is looked at."""
    if not model.config.n_encoder_layers:
        return model(tokens, **terms)
    return model(ids(5), tokens, **{f"target_{name}": term for name, term in terms.items()})


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_see_what_they_may(name):
    """A change of token j reaches no output before it, and none of another sequence."""
    model, tokens = TINY[name], ids()
    y = run(model, tokens)
    for j in range(N):
        other = tokens.clone()
        other[1, j] = (other[1, j] + 1) % 13
        changed = ((run(model, other) - y).abs() > 1e-9).any(-1)  # experts sort tokens anew
        assert not changed[[0, 2, 3]].any()
        if model.config.is_causal:
            assert not changed[1, :j].any()
        assert changed[1, j:].any()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_ignore_padding(name, side):
    """Batch and length are equal to the number of heads here, so that no mask fits by chance."""
    model, lengths = TINY[name], torch.tensor([4, 1, 3, 4])
    tokens, mask = ids()[:, :4], padding_mask(lengths, 4, side=side)
    positions = (mask[:, 0, 0].cumsum(-1) - 1).clamp(min=0)
    y = run(model, tokens, mask=mask, positions=positions)
    for b in range(4):
        real = mask[b, 0, 0]
        alone = run(model, tokens[:, real])[b]
        assert_close(y[b, real], alone)


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_show_their_attention(name):
    model = TINY[name]
    given = (ids(5), ids()) if model.config.n_encoder_layers else (ids(),)
    maps = attention_maps(model, *given)
    c = model.config
    assert len(maps) == c.n_layers * (2 if c.n_encoder_layers else 1) + c.n_encoder_layers
    for key, weights in maps.items():
        sums = weights.sum(-1)
        assert (sums < 1).all() if c.sinks else torch.allclose(sums, torch.ones_like(sums))
        if c.is_causal and "encoder.blocks" not in key and "cross" not in key:
            assert (weights.triu(1) == 0).all()
            layer = int(key.split(".")[2])
            assert (weights.tril(-3) == 0).all() == c.is_local(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_keep_their_dtype_and_state(name, dtype):
    config = TINY[name].config
    model = build(config).eval()
    model.load_state_dict(TINY[name].state_dict())
    assert_close(run(model, ids()), run(TINY[name], ids()).float(), atol=1e-3, rtol=1e-3)
    y = run(model.to(dtype), ids())
    assert y.dtype == dtype
    assert y.isfinite().all()


def test_tiny_models_are_made_of_what_the_big_ones_are():
    for name, model in TINY.items():
        big = full_size(name)
        for kind in LatentAttention, MoELayer:
            found = [any(isinstance(m, kind) for m in one.modules()) for one in (model, big)]
            assert found[0] == found[1]
        names = [{re.sub(r"\.\d+\.", ".*.", n) for n in one.state_dict()} for one in (model, big)]
        assert names[0] == names[1], name
