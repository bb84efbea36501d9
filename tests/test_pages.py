"""Pages: what quantisation may change, what the pool promises, and that sequences which share pages never notice it.

u = 2^-24 is the unit roundoff of fp32, 2^-8 that of bf16: a number rounded to it is off by at most that fraction of itself.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import AutoConfig

from kvlib.cache.attention import attention_through_cache
from kvlib.cache.kivi import DENSE, PAGE_TOKENS, PRECISIONS, PageFormat
from kvlib.cache.methods import build_cache
from kvlib.cache.pages import NO_PAGE, PagePool, PoolExhausted
from kvlib.cache.quant import SMALLEST_SCALE, pack, quantize_range, unpack

torch.set_grad_enabled(False)
QUANTISED = PRECISIONS[1:]
DTYPES = [torch.float32, torch.bfloat16]
HEAD_DIM, N_KV_HEADS, N_LAYERS = 8, 2, 2
DENSE_BYTES = 2 * PAGE_TOKENS * HEAD_DIM * 4
CONFIG = AutoConfig.for_model(
    "qwen2", num_hidden_layers=N_LAYERS, hidden_size=4 * HEAD_DIM, num_attention_heads=4, num_key_value_heads=N_KV_HEADS
)
RECIPES = {
    "kivi-4": dict(),
    "h2o": dict(budget=128, tiers=((4, 0.5), (2, 0.5))),
    "keydiff": dict(budget=160, heads="adaptive", tiers=((4, 1.0),)),
    "snapkv": dict(budget=96),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few KB are not worth waking another core for: on a busy machine that takes ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Codes


def spread(seed: int, magnitude: int, offset: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Numbers of one magnitude around offsets of another, one offset for each first index."""
    offsets = normal(seed + 1, shape[0], *[1] * (len(shape) - 1)) * 10.0**offset
    return (normal(seed, *shape) * 10.0**magnitude + offsets).to(dtype)


anything = dict(
    seed=st.integers(0, 10**6), magnitude=st.integers(-12, 6), offset=st.integers(-12, 6), dtype=st.sampled_from(DTYPES)
)


def half_a_step(bits: int) -> float:
    """Half a step, plus fp32's rounding of x - zero and of its quotient by the scale: u of up to 2^bits steps, each."""
    return 0.5 + 2**bits * 2 * 2**-24


def rounding_of_decode(dtype: torch.dtype) -> float:
    """zero + codes * scale is rounded to fp32, then to the model's dtype; the product of two 8-bit numbers is exact."""
    return 2**-24 if dtype == torch.float32 else 2**-24 + 2**-8 * (1 + 2**-24)


@settings(max_examples=80, deadline=None)
@given(bits=st.sampled_from(QUANTISED), **anything)
def test_codes_stay_within_half_a_step_and_reach_both_ends(bits, seed, magnitude, offset, dtype):
    x = spread(seed, magnitude, offset, dtype, 6, 3, 32)
    codes, scale, zero = quantize_range(x, bits)
    assert codes.dtype == torch.uint8 and codes.max() <= 2**bits - 1
    above = x.double() - zero.double()
    assert ((codes * scale.double() - above).abs() <= scale.double() * half_a_step(bits)).all()
    # The step is formed in fp32 by a difference and a quotient, then rounded up to bf16, by under 2^-7 of itself.
    step = above.amax(-1, keepdim=True) / (2**bits - 1)
    assert (scale.double() >= step * (1 - 2 * 2**-24)).all()
    assert (scale.double() <= step * (1 + 2**-7) * (1 + 2 * 2**-24) + SMALLEST_SCALE).all()


def scales(kind: PageFormat, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of every number of pages: of keys [n, 1, D], of values [n, 32, D]."""
    return tensors[1][:, None], tensors[4].transpose(1, 2).repeat_interleave(kind.head_dim // kind.value_groups, -1)


@settings(max_examples=80, deadline=None)
@given(bits=st.sampled_from(QUANTISED), head_dim=st.sampled_from([4, 32, 96]), **anything)
def test_a_page_comes_back_within_half_a_step(bits, head_dim, seed, magnitude, offset, dtype):
    kind = PageFormat(bits, head_dim, dtype)
    key = spread(seed, magnitude, offset, dtype, head_dim, 2, PAGE_TOKENS).permute(1, 2, 0)  # an offset per channel
    value = spread(seed, magnitude, offset, dtype, PAGE_TOKENS, 2, head_dim).transpose(0, 1)  # an offset per token
    tensors = kind.encode(key, value)
    for x, read, scale in zip((key, value), kind.decode(tensors), scales(kind, tensors)):
        steps = scale.double() * half_a_step(bits)
        error = (read.double() - x.double()).abs()
        assert read.dtype == dtype and (error <= steps + rounding_of_decode(dtype) * (x.double().abs() + steps)).all()


@settings(max_examples=60, deadline=None)
@given(**anything)
def test_demotion_adds_half_a_step_of_each_precision(seed, magnitude, offset, dtype):
    four, two = (PageFormat(bits, 32, dtype) for bits in (4, 2))
    key, value = (spread(seed + i, magnitude, offset, dtype, 2, PAGE_TOKENS, 32) for i in range(2))
    first = four.encode(key, value)
    second = two.encode(*four.decode(first))
    for x, read, fine, coarse in zip((key, value), two.decode(second), scales(four, first), scales(two, second)):
        steps = fine.double() * half_a_step(4) + coarse.double() * half_a_step(2)
        rounding = 2 * rounding_of_decode(dtype) * (x.double().abs() + steps)  # decoded twice
        assert ((read.double() - x.double()).abs() <= steps + rounding).all()


@pytest.mark.parametrize("bits", QUANTISED)
def test_keys_share_a_scale_per_channel_and_values_one_per_token_and_32_channels(bits):
    kind, (key, value) = PageFormat(bits, 64, torch.float32), normal(0, 2, 1, PAGE_TOKENS, 64)
    before = kind.decode(kind.encode(key, value))
    for x in (key, value):
        x[0, 5, 3] = 1000.0
    changed_keys, changed_values = ((a != b)[0] for a, b in zip(before, kind.decode(kind.encode(key, value))))
    assert changed_keys.any(0).nonzero().tolist() == [[3]] and changed_keys[:, 3].sum() > 1
    assert changed_values.any(1).nonzero().tolist() == [[5]]
    assert changed_values[5, :32].sum() > 1 and not changed_values[5, 32:].any()


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(QUANTISED), **anything)
def test_constant_groups_come_back_exactly(bits, seed, magnitude, offset, dtype):
    kind = PageFormat(bits, 32, dtype)
    key = spread(seed, magnitude, offset, dtype, 3, 1, 32).expand(3, PAGE_TOKENS, 32)
    value = spread(seed, magnitude, offset, dtype, 3, PAGE_TOKENS, 1).expand(3, PAGE_TOKENS, 32)
    read_key, read_value = kind.decode(kind.encode(key, value))
    assert read_key.equal(key) and read_value.equal(value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_has_no_scale_is_refused(bad):
    x = torch.full((2, 32), -3e38)
    x[1, 7] = bad  # 3e38 is a number, but its distance from -3e38 is not
    with pytest.raises(ValueError, match="quantize_range.*NaN, infinity or a range beyond fp32"):
        quantize_range(x, 4)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(QUANTISED), n_bytes=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_unpack_returns_what_was_packed(bits, n_bytes, seed):
    n = n_bytes * 8 // bits
    codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (3, n_bytes) and packed.dtype == torch.uint8
    assert unpack(packed, bits).equal(codes)
    assert packed[:, 0].tolist() == sum(codes[:, i * n_bytes].int() << bits * i for i in range(8 // bits)).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*range(4, 33, 4), 64, 96, 128])
@pytest.mark.parametrize("bits", PRECISIONS)
def test_page_bytes_are_those_of_the_tensors(bits, head_dim, dtype):
    kind = PageFormat(bits, head_dim, dtype)
    tensors = kind.encode(*normal(0, 2, 3, PAGE_TOKENS, head_dim).to(dtype))
    assert [(tuple(x.shape[1:]), x.dtype) for x in tensors] == list(kind.fields().values())
    assert sum(x.nbytes for x in tensors) == 3 * kind.page_bytes


def test_scales_and_zeros_cost_one_more_bit_per_number():
    bits = {bits: PageFormat(bits, 128, torch.bfloat16).page_bytes * 8 / (2 * PAGE_TOKENS * 128) for bits in PRECISIONS}
    assert bits == {16: 16.0, 8: 9.0, 4: 5.0, 2: 3.0}


def test_pages_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="bits: expected one of 16, 8, 4, 2, got 3"):
        PageFormat(3, 64, torch.float32)
    for head_dim in (2, 30, 36, 48):
        with pytest.raises(ValueError, match=f"head_dim of 4 to 32 by fours, or a multiple of 32, got {head_dim}"):
            PageFormat(4, head_dim, torch.float32)


# The pool


def new_pool(**options) -> PagePool:
    pool = PagePool(HEAD_DIM, **options)
    pool.open(torch.zeros(1, HEAD_DIM))
    return pool


def store(pool: PagePool, bits: int, n: int, seed: int = 0, parents: np.ndarray | None = None) -> np.ndarray:
    return pool.store(bits, *normal(seed, 2, n, PAGE_TOKENS, HEAD_DIM), parents)


def books(pool: PagePool) -> list:
    """All that the pool knows, as plain values."""
    numbers = [x.tolist() for x in (pool.bits, pool.slot, pool.references)]
    slabs = {bits: tuple(slab.shape) for bits, slab in pool.slabs.items()}
    return copy.deepcopy([numbers, slabs, pool.free_pages, pool.free_slots, pool.known, pool.used_bytes])


def check_books(pool: PagePool) -> None:
    """Every page number and every slot is either free or used once, and the bytes add up."""
    live, used = np.flatnonzero(pool.references), 0
    assert (pool.references >= 0).all() and sorted([*pool.free_pages, *live]) == list(range(len(pool.references)))
    for bits in pool.slabs:
        these = live[pool.bits[live] == bits]
        assert sorted([*pool.free_slots[bits], *pool.slot[these]]) == list(range(pool.room(bits)))
        used += len(these) * pool.formats[bits].page_bytes
    slab_bytes = sum(slab.nbytes for slab in pool.slabs.values())
    assert used == pool.used_bytes <= slab_bytes == pool.slab_bytes <= (pool.budget_bytes or slab_bytes)
    assert sorted(pool.known.page.values()) == sorted(pool.known.digest) and set(pool.known.digest) <= set(live.tolist())


steps_on_a_pool = st.lists(
    st.tuples(
        st.sampled_from(["store", "allocate", "reserve", "retain", "release", "release", "compact"]),
        st.sampled_from(PRECISIONS),
        st.integers(0, 9),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps_on_a_pool, salt=st.sampled_from([None, b"salt"]), budget=st.sampled_from([None, 20 * DENSE_BYTES]))
def test_after_every_step_books_balance_and_contents_are_what_they_were(steps, salt, budget):
    pool, held, contents = new_pool(budget_bytes=budget, salt=salt), [], {}
    for step, bits, n in steps:
        before = books(pool)
        try:
            if step in ("store", "allocate"):
                pages = store(pool, bits, n + 1, seed=n) if step == "store" else pool.allocate(bits, n + 1)
                held += pages.tolist()
                contents |= {page: [x[i] for x in pool.read(pages)] for i, page in enumerate(pages.tolist())}
            elif step == "reserve":
                pool.reserve({bits: n + 1, DENSE: 1})
            elif step == "compact":
                pool.compact({bits: n})
            elif held and step == "retain":
                pool.retain(np.array([held[n % len(held)], NO_PAGE]))
                held.append(held[n % len(held)])
            elif held:
                pool.release(np.array([held.pop(n % len(held)), NO_PAGE]))
        except PoolExhausted:
            assert budget is not None and books(pool) == before
        check_books(pool)
        assert np.bincount(held, minlength=len(pool.references)).tolist() == pool.references.tolist()
        for page in set(held):
            assert all(x.equal(y) for x, y in zip(pool.read(np.array(page)), contents[page]))
    pool.release(np.array(held, np.int32))
    assert pool.used_bytes == 0
    pool.clear()
    assert pool.slab_bytes == 0


@pytest.mark.parametrize("act", [lambda p: p.allocate(4, 99), lambda p: p.reserve({16: 1, 4: 99}), lambda p: store(p, 4, 99)])
def test_what_does_not_fit_changes_nothing(act):
    pool = new_pool(budget_bytes=10 * DENSE_BYTES)
    pages = store(pool, DENSE, 6)
    pool.release(pages[1:3])
    before, contents = books(pool), pool.read(pages[[0, 3, 4, 5]])
    with pytest.raises(PoolExhausted, match="free a sequence or raise budget_bytes"):
        act(pool)
    assert books(pool) == before
    assert all(x.equal(y) for x, y in zip(pool.read(pages[[0, 3, 4, 5]]), contents))
    assert len(pool.allocate(DENSE, 6)) == 6  # ten pages fit, four are used


def test_another_precisions_free_slots_make_room():
    pool = new_pool(budget_bytes=10 * DENSE_BYTES)
    pages = store(pool, DENSE, 10)
    kept = pool.read(pages[9:])
    pool.release(pages[:9])
    n = 9 * DENSE_BYTES // pool.formats[2].page_bytes
    assert len(store(pool, 2, n, seed=1)) == n
    assert all(x.equal(y) for x, y in zip(pool.read(pages[9:]), kept))
    check_books(pool)


def test_a_page_released_twice_is_noticed():
    pool = new_pool()
    pages = store(pool, 4, 2)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages[[0, 0]])
    pool = new_pool()
    pages = store(pool, 4, 2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages[:1])


def test_pages_in_use_cannot_be_cleared_away():
    pool = new_pool()
    store(pool, 4, 1)
    with pytest.raises(AssertionError, match="in use"):
        pool.clear()


def test_compacting_keeps_numbers_and_contents_and_returns_the_rest():
    pool = new_pool()
    pages = {bits: store(pool, bits, 9, seed=bits) for bits in PRECISIONS}
    kept = {bits: numbers[[1, 4, 8]] for bits, numbers in pages.items()}
    before = {bits: pool.read(numbers) for bits, numbers in kept.items()}
    for bits, numbers in pages.items():
        pool.release(np.setdiff1d(numbers, kept[bits]))
    pool.compact({4: 2, 8: 100})
    assert {bits: pool.room(bits) for bits in PRECISIONS} == {16: 3, 8: 9, 4: 5, 2: 3}  # it never grows a slab
    pool.compact()
    assert pool.slab_bytes == pool.used_bytes == sum(3 * kind.page_bytes for kind in pool.formats.values())
    for bits, numbers in kept.items():
        assert all(x.equal(y) for x, y in zip(pool.read(numbers), before[bits]))
    check_books(pool)


def test_a_reservation_is_exact_and_counts_what_is_free():
    pool = new_pool()
    store(pool, 4, 3)
    pool.release(store(pool, 4, 2, seed=1))
    free = pool.room(4) - 3
    pool.reserve({DENSE: 3, 4: free + 5})
    assert (pool.room(DENSE), pool.room(4)) == (3, free + 8)
    before = [pool.slabs[bits].data_ptr() for bits in (DENSE, 4)]
    pool.reserve({DENSE: 3, 4: free + 5})
    store(pool, DENSE, 3)
    store(pool, 4, free + 5, seed=2)
    assert [pool.slabs[bits].data_ptr() for bits in (DENSE, 4)] == before
    check_books(pool)


def test_owning_copies_shared_pages_only():
    pool = new_pool()
    mine = store(pool, DENSE, 3)
    pool.retain(mine[1:2])
    contents = pool.read(mine)
    owned = pool.own(mine)
    assert owned[[0, 2]].tolist() == mine[[0, 2]].tolist() and owned[1] not in mine
    assert pool.references[[*mine, owned[1]]].tolist() == [1, 1, 1, 1]
    assert all(x.equal(y) for x, y in zip(pool.read(owned), contents))
    pool.write(owned[1:2], np.array([7]), *torch.ones(2, 1, HEAD_DIM))
    assert all(x.equal(y) for x, y in zip(pool.read(mine), contents))
    assert pool.read(owned)[0][1, 7].eq(1).all()


def test_a_shared_page_cannot_be_written_to():
    pool = new_pool()
    page = store(pool, DENSE, 1)
    pool.retain(page)
    with pytest.raises(AssertionError, match="a shared page was written to"):
        pool.write(page, np.array([0]), *torch.zeros(2, 1, HEAD_DIM))


def test_a_pool_serves_one_kind_of_keys():
    pool = new_pool()
    for other in (torch.zeros(1, HEAD_DIM, dtype=torch.bfloat16), torch.zeros(1, 2 * HEAD_DIM)):
        with pytest.raises(ValueError, match="page pool: expected head_dim, dtype and device .* got .* use another pool"):
            pool.open(other)


@pytest.mark.parametrize("bits", PRECISIONS)
def test_equal_prefixes_are_one_page_under_one_salt(bits):
    pool = new_pool(salt=b"a")
    first = store(pool, bits, 2)
    used = pool.used_bytes
    assert store(pool, bits, 2).tolist() == first.tolist() and pool.used_bytes == used
    twice = pool.store(bits, *normal(0, 2, 2, PAGE_TOKENS, HEAD_DIM)[:, [0, 0]])
    assert twice.tolist() == [first[0]] * 2 and pool.references[first].tolist() == [4, 2]
    second = store(pool, bits, 1, seed=1, parents=first[:1])
    assert store(pool, bits, 1, seed=1, parents=first[:1]).tolist() == second.tolist()
    check_books(pool)


def test_other_contents_parents_precisions_and_salts_are_other_pages():
    pool = new_pool(salt=b"a")
    page, other = store(pool, 4, 1), store(pool, 4, 1, seed=1)
    pages = [page, other, store(pool, 8, 1), store(pool, 4, 1, parents=page), store(pool, 4, 1, parents=other)]
    pool.salt = b"b"
    pages.append(store(pool, 4, 1))
    pages += [store(new_pool(), 4, 2)[:0], store(pool, 4, 1, parents=pages[-1])]
    numbers = np.concatenate(pages).tolist()
    assert len(set(numbers)) == len(numbers) == 7
    check_books(pool)


def test_without_a_salt_nothing_is_shared():
    pool = new_pool()
    assert not set(store(pool, 4, 2).tolist()) & set(store(pool, 4, 2).tolist())


def test_a_freed_page_is_forgotten():
    pool = new_pool(salt=b"a")
    first = store(pool, 4, 1)
    contents = pool.read(first)
    store(pool, 4, 1)
    pool.release(first)
    assert store(pool, 4, 1).tolist() == first.tolist()  # one reference was left
    pool.release(np.repeat(first, 2))
    assert store(pool, 4, 1, seed=1).tolist() == first.tolist()  # the number, with other contents
    again = store(pool, 4, 1)
    assert again.tolist() != first.tolist() and all(x.equal(y) for x, y in zip(pool.read(again), contents))


# Sequences that share a pool


def feed(cache, t: int, batch: int = 1, seed: int = 0, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention [N_LAYERS, B, H, t, D] of t new tokens in each layer; seed, not batch, decides what they are."""
    out = []
    for i, layer in enumerate(cache.layers):
        x = normal(10 * seed + i, t, batch, 4 + 2 * N_KV_HEADS, HEAD_DIM).permute(1, 2, 0, 3)
        query, key, value = x.split([4, N_KV_HEADS, N_KV_HEADS], 1)
        layer.update(key, value)
        out.append(layer.store.attend(query, mask, HEAD_DIM**-0.5))
    return torch.stack(out)


def left_padding(t: int, n_pad: int) -> torch.Tensor:
    """A mask [2, 1, t, t] for two sequences, the first of them padded."""
    mask = torch.ones(2, 1, t, t, dtype=torch.bool).tril()
    mask[0, ..., :n_pad] = False
    return mask


def tables(cache) -> list:
    return [layer.store.table for layer in cache.layers]


def readout(cache) -> list:
    """All that a cache answers with: per layer the keys, values and scores that exist, and the counts of tokens."""
    answer = [layer.n_seen for layer in cache.layers]
    for table in filter(None, tables(cache)):
        key, value, exists = table.read()
        exists = torch.ones(key.shape[:3], dtype=torch.bool) if exists is None else exists
        answer += [table.n_seen.tolist(), table.start.tolist(), exists.tolist(), key[exists], value[exists], table.key_sum]
        in_full, waiting, width = table.layout()
        if table.scores:
            parts = [("full", in_full // PAGE_TOKENS, PAGE_TOKENS), ("reservoir", waiting, 1), ("window", width, 1)]
            scores = torch.cat([table.scores[part][..., :n].repeat_interleave(k, -1) for part, n, k in parts], -1)
            answer.append(scores[exists])
    return answer


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(x.equal(y) if torch.is_tensor(x) else x == y for x, y in zip(one, other))


def in_use(pool: PagePool, caches: list) -> list[int]:
    """How often each page occurs in the tables of these caches."""
    pages = [table.pages() for cache in caches for table in tables(cache) if table]
    return np.bincount(np.concatenate([np.zeros(0, np.int32), *pages]), minlength=len(pool.references)).tolist()


class SharedPool(RuleBasedStateMachine):
    """Several caches on one pool. Each has a shadow, a cache with a pool of its own that goes through the same: as long as
    both answer alike, bit for bit, no one notices the others. Where the pool has no room, nothing may have changed."""

    @initialize(salt=st.sampled_from([None, b"salt"]), budget=st.sampled_from([None, 30 * DENSE_BYTES, 100 * DENSE_BYTES]))
    def open_the_pool(self, salt, budget):
        self.pool, self.caches = PagePool(HEAD_DIM, budget, salt), []

    def grow(self, which: int, *args) -> None:
        """Feed a cache and its shadow, unless the pool has no room."""
        cache, shadow, _, batch = self.caches[which]
        try:
            out = feed(cache, *args)
        except PoolExhausted:
            assert self.pool.budget_bytes is not None
            self.caches[which][3] = batch if tables(shadow)[0] else None
        else:
            assert out.equal(feed(shadow, *args))

    @precondition(lambda self: len(self.caches) < 4)
    @rule(
        method=st.sampled_from(list(RECIPES)), batch=st.integers(1, 2), t=st.integers(1, 140), seed=st.integers(0, 1),
        capacity=st.sampled_from([0, 150]),
    )  # fmt: skip
    def start(self, method, batch, t, seed, capacity):
        options, pools = RECIPES[method], (self.pool, PagePool(HEAD_DIM))
        pair = [build_cache(method, CONFIG, pool=pool, capacity_tokens=capacity, **options) for pool in pools]
        self.caches.append([*pair, options, batch])
        self.grow(-1, t, batch, seed, left_padding(t, t // 3) if batch == 2 and t >= 3 else None)

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), pieces=st.lists(st.integers(1, 70), min_size=1, max_size=3), seed=st.integers(0, 1))
    def append(self, data, pieces, seed):
        which = data.draw(st.integers(0, len(self.caches) - 1))
        for t in pieces:
            batch = self.caches[which][3] = self.caches[which][3] or data.draw(st.integers(1, 2))
            self.grow(which, t, batch, seed)

    def choose(self, data) -> list:
        return data.draw(st.sampled_from([entry for entry in self.caches if entry[3]]))

    started = precondition(lambda self: any(entry[3] for entry in self.caches))

    @started
    @rule(data=st.data())
    def fork(self, data):
        cache, shadow, options, batch = self.choose(data)
        self.caches.append([cache.fork(), copy.deepcopy(shadow), options, batch])

    @started
    @rule(data=st.data(), how=st.sampled_from(["batch_repeat_interleave", "reorder_cache", "batch_select_indices"]))
    def rearrange(self, data, how):
        entry = self.choose(data)
        rows = data.draw(st.lists(st.integers(0, entry[3] - 1), min_size=1, max_size=4))
        for cache in entry[:2]:
            getattr(cache, how)(2 if how == "batch_repeat_interleave" else torch.tensor(rows))
        entry[3] = entry[3] * 2 if how == "batch_repeat_interleave" else len(rows)

    @started
    @rule(data=st.data(), n=st.integers(1, 70))
    def crop(self, data, n):
        entry = self.choose(data)
        n_seen = entry[1].get_seq_length()
        inside = min(int((table.n_seen - table.start).min()) for table in tables(entry[1]))
        if inside < n < n_seen:
            with pytest.raises(ValueError, match=f"can forget its newest {inside} tokens, not {n}"):
                entry[0].crop(-n)
            return
        for cache in entry[:2]:
            cache.crop(-n)
        entry[3] = entry[3] if n < n_seen else None

    @precondition(lambda self: sum(entry[3] is not None for entry in self.caches) > 2)  # else little is ever shared
    @rule(data=st.data(), dropped=st.booleans())
    def reset(self, data, dropped):
        entry = self.choose(data)
        for cache in entry[:2]:
            cache.reset()
        entry[3] = None
        if dropped:
            self.caches.remove(entry)

    @invariant()
    def every_cache_answers_as_if_it_were_alone(self):
        for cache, shadow, *_ in self.caches:
            assert same(readout(cache), readout(shadow))

    @invariant()
    def references_are_the_pages_of_the_tables(self):
        assert self.pool.references.tolist() == in_use(self.pool, [entry[0] for entry in self.caches])
        check_books(self.pool)

    @invariant()
    def budgets_hold(self):
        for cache, _, options, _ in self.caches:
            for table in filter(None, tables(cache) if options else []):
                n_kept = table.n_kept.mean(1) if "heads" in options else table.n_kept
                assert (n_kept <= options["budget"] + PAGE_TOKENS).all()

    def teardown(self):
        if hasattr(self, "pool"):
            for cache, *_ in self.caches:
                cache.reset()
            assert not self.pool.references.any() and not self.pool.slabs


SharedPool.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestSharedPool = SharedPool.TestCase


@pytest.mark.parametrize("name", RECIPES)
def test_forks_share_their_pages_until_they_differ(name):
    pool = PagePool(HEAD_DIM)
    cache = build_cache(name, CONFIG, pool=pool, **RECIPES[name])
    feed(cache, 200)
    before, per_copy = (pool.slab_bytes, pool.used_bytes), N_LAYERS * N_KV_HEADS * DENSE_BYTES
    twin = cache.fork()
    assert (pool.slab_bytes, pool.used_bytes) == before
    twin.batch_repeat_interleave(8)
    assert (pool.slab_bytes, pool.used_bytes) == before
    feed(cache, 1)
    assert pool.used_bytes == before[1] + per_copy  # of the open page, tokens 192 to 199
    feed(twin, 1, batch=8)
    assert pool.used_bytes == before[1] + 8 * per_copy  # eight open pages of the twin's and one of the parent's


def test_equal_prefixes_share_their_full_pages_and_equal_middles_do_not():
    pool, key = PagePool(HEAD_DIM, salt=b"a"), normal(0, 1, N_KV_HEADS, 110, HEAD_DIM)
    other = key.clone()
    other[:, :, 5] += 1.0
    stores = [build_cache("kivi-4", CONFIG, pool=pool).layers[0].store for _ in range(3)]
    for store, x in zip(stores, (key, key[:, :, :97], other)):
        store.append(x, x)
        store.attend(torch.zeros(1, 4, x.shape[2], HEAD_DIM), None, 1.0)
    first, second, third = (store.table.full.tolist() for store in stores)
    assert first == second and not set(np.ravel(first)) & set(np.ravel(third))
    assert np.shape(first) == np.shape(third) == (1, N_KV_HEADS, 2)


def test_an_unused_cache_can_be_forked():
    cache = build_cache("h2o", CONFIG, budget=128)
    twin = cache.fork()
    feed(cache, 40, seed=1)
    assert feed(twin, 40, seed=2).equal(feed(build_cache("h2o", CONFIG, budget=128), 40, seed=2))


@pytest.mark.parametrize("name", RECIPES)
def test_rows_that_were_forked_inside_a_batch_lead_their_own_lives(name):
    together, alone = build_cache(name, CONFIG, **RECIPES[name]), []
    feed(together, 150)
    together.batch_repeat_interleave(3)
    feed(together, 90, batch=3, seed=1)
    for row in range(3):
        cache = build_cache(name, CONFIG, **RECIPES[name])
        feed(cache, 150)
        for i, layer in enumerate(cache.layers):
            x = normal(10 + i, 90, 3, 4 + 2 * N_KV_HEADS, HEAD_DIM).permute(1, 2, 0, 3)[row : row + 1]
            query, key, value = x.split([4, N_KV_HEADS, N_KV_HEADS], 1)
            layer.update(key, value)
            layer.store.attend(query, None, HEAD_DIM**-0.5)
        alone.append(tables(cache))
    for i, table in enumerate(tables(together)):
        key, value, exists = table.read()
        exists = torch.ones(key.shape[:3], dtype=torch.bool) if exists is None else exists
        for row in range(3):
            one_key, one_value, one = alone[row][i].read()
            one = torch.ones(one_key.shape[:3], dtype=torch.bool) if one is None else one
            assert key[row : row + 1][exists[row : row + 1]].equal(one_key[one])
            assert value[row : row + 1][exists[row : row + 1]].equal(one_value[one])


@pytest.mark.parametrize(
    "name, options",
    [("h2o", dict(budget=96)), ("kivi-4", dict()), ("hybrid-8x", dict(budget=160)), ("keydiff", dict(budget=96))],
)
def test_a_fork_and_its_parent_continue_as_two_caches_would(name, options):
    network = tiny_network("qwen2")
    prefix, mine, yours = (torch.randint(1, 128, (1, n), generator=torch.Generator().manual_seed(n)) for n in (180, 40, 41))
    with attention_through_cache(network):
        parent = build_cache(name, network, **options)
        network(prefix, past_key_values=parent)
        fork, logits = parent.fork(), []
        for part in range(2):  # in turns, so that each writes after the other has
            pieces = [(ids[:, 20 * part :][:, : 20 + part], cache) for ids, cache in ((mine, parent), (yours, fork))]
            logits += [network(ids, past_key_values=cache).logits for ids, cache in pieces]
        for whose, ids in enumerate((mine, yours)):
            cache = build_cache(name, network, **options)
            network(prefix, past_key_values=cache)
            for part in range(2):  # the same sums in the same order, hence exactly
                piece = ids[:, 20 * part :][:, : 20 + part]
                assert network(piece, past_key_values=cache).logits.equal(logits[2 * part + whose])


# No room, no number


@pytest.mark.parametrize("t", [1, 2, 34, 70])
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("name", ["kivi-4", "h2o"])
def test_whatever_the_budget_a_forward_fits_or_changes_nothing(name, n_rows, t):
    cache = build_cache(name, CONFIG, pool=PagePool(HEAD_DIM), **(dict(budget=128, tiers=((4, 1.0),)) if name == "h2o" else {}))
    feed(cache, 191)  # the next token closes a page: all moves
    twin = cache.fork()
    cache.batch_repeat_interleave(n_rows)
    cache.layers[0].store.pool.compact()
    pool = cache.layers[0].store.pool
    before = books(pool), readout(cache), readout(twin)
    for spare in range(0, 200 * DENSE_BYTES, DENSE_BYTES // 2):
        pool.budget_bytes = pool.slab_bytes + spare
        try:
            feed(cache, t, batch=n_rows)
            break
        except PoolExhausted:
            assert books(pool) == before[0]
            assert same(readout(cache), before[1]) and same(readout(twin), before[2])
    check_books(pool)
    assert spare > 0 and cache.get_seq_length() == 191 + t and same(readout(twin), before[2])


def test_a_cache_without_room_stays_usable():
    network, ids = tiny_network("qwen2"), torch.randint(1, 128, (1, 2000), generator=torch.Generator().manual_seed(0))
    pool = PagePool(HEAD_DIM, budget_bytes=80 * DENSE_BYTES)
    with attention_through_cache(network):
        cache, lone = (build_cache("kivi-4", network, pool=p) for p in (pool, PagePool(HEAD_DIM)))
        with pytest.raises(PoolExhausted, match="page pool: .* more bytes are needed"):
            network(ids[:, :100].expand(20, -1), past_key_values=cache)
        assert cache.get_seq_length() == 0 and not pool.references.any()
        for each in (cache, lone):  # one sequence fits where twenty did not
            network(ids[:, :100], past_key_values=each)
        sibling = cache.fork()
        before = books(pool), readout(cache), readout(sibling)
        with pytest.raises(PoolExhausted, match="page pool: .* more bytes are needed"):
            network(ids[:, 100:], past_key_values=cache)
        assert cache.get_seq_length() == sibling.get_seq_length() == 100
        assert books(pool) == before[0] and same(readout(cache), before[1]) and same(readout(sibling), before[2])
        logits = network(ids[:, 100:103], past_key_values=cache).logits
        assert logits.equal(network(ids[:, 100:103], past_key_values=lone).logits)
        assert same(readout(sibling), before[2])


@pytest.mark.parametrize("what", ["key", "value"])
def test_what_is_no_number_is_named_by_layer_and_position(what):
    cache = build_cache("kivi-4", CONFIG)
    feed(cache, 30)
    x = normal(1, 2, 1, N_KV_HEADS, 9, HEAD_DIM)
    x[int(what == "value"), 0, 1, 7, 2] = float("nan")
    before = readout(cache)
    with pytest.raises(ValueError, match=rf"the {what} of layer 1, position 37 is nan \(sequence 0, KV head 1, channel 2\)"):
        cache.layers[1].update(*x)
    assert same(readout(cache), before)


@pytest.mark.parametrize("name", RECIPES)
def test_what_nobody_wrote_reaches_no_output(name, monkeypatch):
    def poisoned(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    pool = PagePool(HEAD_DIM)
    cache, other = (build_cache(name, CONFIG, pool=pool, **RECIPES[name]) for _ in range(2))
    feed(other, 250)
    feed(cache, 200, batch=2, mask=left_padding(200, 165))
    other.reset()
    pool.compact({DENSE: 8})
    assert torch.isfinite(torch.cat([feed(cache, t, batch=2) for t in (1, 40, 1)], 3)).all()


def test_a_shorter_sequence_needs_no_page_of_another_cache():
    pool = PagePool(HEAD_DIM)
    other, cache = (build_cache(name, CONFIG, pool=pool) for name in ("kivi-2", "kivi-4"))
    feed(other, 100)
    feed(cache, 100, batch=2, mask=left_padding(100, 40))
    other.reset()
    pool.compact()  # not one page of 2 bits is left, and number 0 was one
    lone = build_cache("kivi-4", CONFIG)
    feed(lone, 100, batch=2, mask=left_padding(100, 40))
    assert feed(cache, 1, batch=2, seed=1).equal(feed(lone, 1, batch=2, seed=1))
