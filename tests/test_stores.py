"""Buffers, INT8 codes and dense attention against what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.cache.attention import dense_attention
from kvlib.cache.buffer import TokenBuffer
from kvlib.cache.int8 import NaiveInt8Store
from kvlib.cache.int8_bnb import BlockwiseInt8Store, codebook
from kvlib.cache.int8_fused import FusedInt8Store
from kvlib.cache.quant import dequantize_int8, quantize_int8
from kvlib.kernels.reference import reference_attention


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-12, 6),
    dim=st.sampled_from([-1, -2]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_int8_error_is_at_most_half_a_step(seed, exponent, dim, dtype):
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x = x.to(getattr(torch, dtype))
    codes, scale = quantize_int8(x, dim)
    error = (codes.double() * scale.double() - x.double()).abs()
    # Half a step, plus the rounding of x / scale in fp32: 127 half-ulps, 127 * 2^-24 of a step.
    assert (error <= scale.double() * (0.5 + 127 * 2**-24)).all()


def test_int8_extremes():
    zeros = torch.zeros(1, 1, 2, 4)
    assert dequantize_int8(*quantize_int8(zeros, -1), torch.float32).eq(0).all()
    constant = torch.full((1, 1, 2, 4), 127 * 0.25)  # scale 0.25 is exact in bf16
    assert dequantize_int8(*quantize_int8(constant, -1), torch.float32).equal(constant)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 1, 2, 4)
        x[..., 1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize_int8(x, -1)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        quantize_int8(torch.ones(3, 4), -1)
    with pytest.raises(ValueError, match="int64"):
        quantize_int8(torch.ones(1, 1, 2, 4, dtype=torch.long), -1)


def test_int8_store_keeps_codes_not_numbers():
    store = NaiveInt8Store(capacity_tokens=7)
    key, value = torch.randn(2, 2, 3, 7, 16)
    store.append(key, value)
    assert [b.room.dtype for b in store.buffers] == [torch.int8, torch.bfloat16] * 2
    for x, read in zip((key, value), store.read()):
        whole = dequantize_int8(*quantize_int8(x, -1), x.dtype)
        torch.testing.assert_close(read, whole, rtol=0, atol=0)  # head by head equals all at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_fused_int8_is_the_naive_store_without_its_copy(head_dim, dtype):
    naive, fused = NaiveInt8Store(), FusedInt8Store()
    for n in (70, 1, 1, 40):
        key, value = torch.randn(2, 2, 3, n, head_dim).to(dtype)
        naive.append(key, value), fused.append(key, value)
    query, mask = torch.randn(2, 6, 1, head_dim).to(dtype), torch.rand(2, 1, 1, 112) < 0.8
    for change in (lambda store: None, lambda store: store.forget(50), lambda store: store.select(torch.tensor([1, 1, 0]))):
        change(naive), change(fused)
        batch, n = fused.batch, fused.length
        assert all(ours.equal(theirs) for ours, theirs in zip(fused.read(), naive.read()))
        for visible in (None, mask[[0, 1, 0][:batch], ..., :n]):
            ours, theirs = (x.attend(query[[0, 1, 0][:batch]], visible, 0.2) for x in (fused, naive))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if dtype == torch.float32 else 2**-6)


def test_fused_int8_refuses_nan_and_forgets_nothing_by_it():
    store = FusedInt8Store()
    store.append(*torch.randn(2, 1, 2, 5, 16))
    before = [x.clone() for x in store.read()]
    with pytest.raises(ValueError, match="NaN or infinity"):
        store.append(*torch.full((2, 1, 2, 1, 16), float("nan")))
    assert store.length == 5 and all(x.equal(y) for x, y in zip(store.read(), before))


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.integers(1, 90), min_size=1, max_size=8), capacity=st.sampled_from([0, 50, 1000]))
def test_a_buffer_returns_what_was_appended(pieces, capacity):
    data = torch.randn(2, 3, sum(pieces), 4)
    buffer = TokenBuffer(capacity)
    for piece in data.split(pieces, dim=2):
        buffer.append(piece)
    assert buffer.read().equal(data)
    buffer.crop(pieces[0])
    assert buffer.read().equal(data[:, :, : pieces[0]])
    buffer.select(torch.tensor([1, 1, 0]))
    assert buffer.read().equal(data[[1, 1, 0], :, : pieces[0]])


def test_growth_copies_each_token_a_few_times_only(monkeypatch):
    buffer, copied = TokenBuffer(), []
    grow = TokenBuffer._grow
    monkeypatch.setattr(
        TokenBuffer, "_grow", lambda self, needed, like: (copied.append(self.length), grow(self, needed, like))
    )
    for _ in range(5000):
        buffer.append(torch.zeros(1, 1, 1, 1))
    assert sum(copied) < 6 * 5000  # growth by a quarter: 1 / (1 - 1/1.25) = 5 copies of a token in the limit
    assert buffer.room.shape[2] <= 1.25 * 5000 + 128


@pytest.mark.parametrize("n_queries", [1, 5, 33])
@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (8, 2), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_attention_against_float64(n_queries, n_heads, n_kv_heads, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, n_heads, n_queries, 32, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, n_kv_heads, 33, 32, generator=generator).to(dtype)
    padding = torch.ones(2, 1, 1, 33, dtype=torch.bool)
    padding[0, ..., : 0 if n_queries == 33 else 4] = False  # a query that sees nothing is no one's business
    causal = torch.ones(n_queries, 33, dtype=torch.bool).tril(33 - n_queries)
    for mask, visible in ((None, None), (padding, padding & causal)):
        truth = reference_attention(query, key, value, 32**-0.5, mask)
        repeated = (x.repeat_interleave(n_heads // n_kv_heads, 1) for x in (key, value))
        bias = torch.zeros(causal.shape).masked_fill(~causal, -torch.inf) if visible is None else visible
        plain = torch.nn.functional.scaled_dot_product_attention(
            query, *repeated, attn_mask=bias.to(dtype) if visible is None else bias
        )
        ours = dense_attention(query, key, value, visible, 32**-0.5)
        floor = torch.finfo(dtype).eps  # of outputs below 1
        assert (ours.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 96])
def test_bitsandbytes_codes_are_off_by_half_a_gap_and_tokens_are_independent(head_dim, dtype):
    pieces = [torch.randn(2, 2, 3, n, head_dim).to(dtype) for n in (70, 1, 9)]
    whole, stepwise, naive = BlockwiseInt8Store(), BlockwiseInt8Store(), NaiveInt8Store()
    x = torch.cat(pieces, 3)
    whole.append(*x), naive.append(*x)
    for piece in pieces:
        stepwise.append(*piece)
    assert [b.room.dtype for b in whole.buffers] == [torch.uint8, torch.float32] * 2
    values, gaps = codebook(x.device), codebook(x.device).sort().values.diff()
    assert 0.014 < gaps.max() < 0.0142  # next to 1; evenly spaced, they would be 2 / 255 = 0.0078
    bound = x.abs().amax(-1, keepdim=True).float() * gaps.max() / 2 * 1.01 + x.abs() * torch.finfo(dtype).eps
    for ours, again, exact, limit in zip(whole.read(), stepwise.read(), x, bound):
        assert ours.dtype == dtype and ours.equal(again)  # a block never holds two tokens
        assert ((ours.float() - exact.float()).abs() <= limit).all() and values.numel() == 256
    stepwise.forget(10)
    assert stepwise.read()[0].equal(whole.read()[0][:, :, :70])
    stepwise.reset(), stepwise.append(*torch.zeros(2, 1, 2, 3, head_dim))
    assert stepwise.read()[0].eq(0).all()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            BlockwiseInt8Store().append(*torch.full((2, 1, 2, 1, head_dim), bad))
