"""Keep rules, budgets and recipes: who stays, against brute force in float64 with the whole T x T matrix."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoConfig

from kvlib.cache.budget import precisions, whole_shares, winners
from kvlib.cache.compete import groups_by_score
from kvlib.cache.keep import RULES, KeepRule
from kvlib.cache.kivi import DENSE, PAGE_TOKENS, PRECISIONS
from kvlib.cache.methods import build_cache
from kvlib.cache.paged import PagedStore, paged_stores
from kvlib.cache.pages import PagePool
from kvlib.cache.recipe import Recipe

torch.set_grad_enabled(False)
N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 8
SCALING = HEAD_DIM**-0.5
# The 8 terms of a logit are 17 in total at most (here), so that fp32, which rounds each at its product, up to 7 sums and the
# scaling, gets it wrong by 17 * 9 * 2^-24. A weight errs by twice that fraction of itself, for its own logit and the others',
# and a sum of weights by no more, plus 2^-24 for each of a dozen nested sums.
ROUNDING = 2 * 17 * 9 * 2**-24 + 12 * 2**-24
VOTING = [name for name, rule in RULES.items() if rule.needs_votes]
EQUAL = KeepRule("no token is better than another", horizon=0, start=lambda key, *_: torch.zeros(key.shape[:3]))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few KB are not worth waking another core for: on a busy machine that takes ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_store(keep: str | None, budget: float | None, **options) -> PagedStore:
    return paged_stores(Recipe(keep, budget, **options), PagePool(HEAD_DIM), owners=[0], capacity_tokens=0)[0]


def tokens(t: int, seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one sequence; channel 0 of a value is its position."""
    x = torch.randn(1, N_HEADS + 2 * N_KV_HEADS, t, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    query, key, value = (y.clone() for y in x.split([N_HEADS, N_KV_HEADS, N_KV_HEADS], 1))
    value[..., 0] = torch.arange(t)
    return query * spread, key, value


def feed(store: PagedStore, sequence, pieces: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """What attention returns for the queries, [B, H, t, D]."""
    out = []
    for query, key, value in zip(*(x.split(pieces, 2) for x in sequence)):
        store.append(key, value)
        out.append(store.attend(query, mask, SCALING))
    return torch.cat(out, 2)


def chunks(t: int, size: int) -> list[int]:
    return [size] * (t // size) + [t % size] * (t % size > 0)


def kept(store: PagedStore, row: int = 0) -> list[list[int]]:
    """Positions that each KV head of a sequence stores, in order."""
    _, value, exists = store.table.read()
    positions = value[row, ..., 0].long()
    exists = torch.ones_like(positions, dtype=torch.bool) if exists is None else exists[row]
    return [sorted(head[there].tolist()) for head, there in zip(positions, exists)]


@pytest.mark.parametrize("tiers", [((16, 1.0),), ((4, 0.5), (2, 0.5))], ids=["dense", "tiers"])
@pytest.mark.parametrize("name", [None, *RULES])
def test_kernels_keep_and_compute_what_torch_does(name, tiers):
    query, key, value = tokens(300, seed=11, spread=2.0)
    sequence, out, found = (query, key, value / 300), {}, {}  # values of about 1
    recipe = Recipe(name, 160, tiers=tiers) if name else Recipe(tiers=((tiers[0][0], 1.0),))
    for backend in ("torch", "numba"):
        store = paged_stores(recipe, PagePool(HEAD_DIM, backend=backend), [0], 0)[0]
        out[backend], found[backend] = feed(store, sequence, [90] + [1] * 210), store
    # 300 terms of about 1, each rounded a few times in fp32 (2^-24) and weighted by softmax weights that sum to 1
    torch.testing.assert_close(out["numba"], out["torch"], rtol=0, atol=2e-5)
    for ours, theirs in zip(found["numba"].table.read(), found["torch"].table.read()):
        assert (ours is None and theirs is None) or ours.equal(theirs)
    for part, scores in found["numba"].table.scores.items():
        torch.testing.assert_close(scores, found["torch"].table.scores[part], rtol=1e-4, atol=1e-6)


def brute_force_weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Causal attention weights [H, T, T] of one sequence in float64, none left out."""
    t = query.shape[2]
    logits = query[0].double() @ key[0].double().repeat_interleave(N_HEADS // N_KV_HEADS, 0).mT * SCALING
    return logits.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def brute_force_counts(weights: torch.Tensor) -> torch.Tensor:
    """1 where a weight is above the average of those in sight; asserts that all are further from it than fp32 might err."""
    ratio = weights * torch.arange(1, weights.shape[1] + 1)[:, None]
    assert (ratio - 1)[:, 1:].abs().min() > ROUNDING  # the first query sees one key, whose weight is 1 in any precision
    return (ratio > 1).double()


def brute_force_scores(name: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scores [H_kv, T] of all tokens when they are read at once."""
    t, weights = key.shape[2], brute_force_weights(query, key)
    if name == "streaming":
        return torch.where(torch.arange(t) < 4, torch.inf, torch.arange(t)).expand(N_KV_HEADS, t)
    if name == "random":  # sines of large numbers: only fp32's own are the same
        return RULES[name].start(key, None, torch.arange(t), 0)[0]
    if name == "keydiff":
        unit = key[0].double() / key[0].double().norm(dim=-1, keepdim=True)
        mean = unit[:, : t // PAGE_TOKENS * PAGE_TOKENS - 32].mean(1, keepdim=True)  # of those that left the window of 32
        return -(unit * mean).sum(-1) / mean.norm(dim=-1)
    per_query_head = {
        "h2o": lambda: weights.sum(1),
        "snapkv": lambda: weights[:, -32:].sum(1),
        "tova": lambda: weights[:, -1].mean(0).expand(N_HEADS, t),
        "scissorhands": lambda: brute_force_counts(weights)[:, -256:].sum(1),
    }[name]()
    return per_query_head.view(N_KV_HEADS, -1, t).sum(1)


def best(scores: torch.Tensor, n: int) -> list[int]:
    """The positions of the best n, the earlier first where scores are equal."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n])


@pytest.mark.parametrize("reservoir", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_reading_at_once_keeps_exactly_the_best(name, reservoir):
    t, budget, window = 400, 160, 32
    query, key, value = tokens(t, seed=10, spread=2.0)
    store = new_store(name, budget, window_tokens=window, reservoir=reservoir)
    feed(store, (query, key, value), [t])
    scores, n_old = brute_force_scores(name, query, key), t // PAGE_TOKENS * PAGE_TOKENS - window
    scores = scores[:, :n_old]
    if name == "snapkv":
        scores = F.max_pool1d(scores, 5, 1, 2)
    n_best = budget - window  # the last of its pages as a reservoir, or not
    for head, found in zip(scores, kept(store)):
        ranked = head.sort(descending=True).values
        gap = ranked[n_best - 1] - ranked[n_best]
        assert gap == 0 or gap > ROUNDING * ranked[n_best].abs()  # else fp32 might choose others
        assert found == best(head, n_best) + list(range(n_old, t))


def test_grouped_queries_are_summed_and_tova_asks_all_heads():
    query, key, value = tokens(300, seed=5, spread=2.0)
    heads = {name: brute_force_scores(name, query, key) for name in ("h2o", "tova")}
    weights = brute_force_weights(query, key)
    torch.testing.assert_close(heads["h2o"][1], weights[2:].sum((0, 1)))
    for name, same in (("h2o", False), ("tova", True)):
        store = new_store(name, 96)
        feed(store, (query, key, value), [300])
        assert (kept(store)[0] == kept(store)[1]) == same


@pytest.mark.parametrize("size", [300, 64, 7, 1])
def test_h2o_adds_up_the_same_attention_however_it_is_read(size):
    t = 300
    query, key, value = tokens(t, spread=2.0)
    store = new_store("h2o", 320)
    feed(store, (query, key, value), chunks(t, size))
    truth, table = brute_force_scores("h2o", query, key), store.table
    in_full, waiting, width = table.layout()
    assert (in_full, waiting, width) == (256, 0, 44)  # nothing was dropped
    positions = table.read()[1][0, ..., 0].long()
    page_sums = truth.gather(1, positions[:, :in_full]).unflatten(1, (-1, PAGE_TOKENS)).sum(-1)
    torch.testing.assert_close(table.scores["full"][0, :, :8].double(), page_sums, rtol=ROUNDING, atol=0)
    recent = truth.gather(1, positions[:, in_full:])
    torch.testing.assert_close(table.scores["window"][0, :, :width].double(), recent, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", VOTING)
def test_the_votes_of_the_newest_queries_weigh_the_older_ones_down(name):
    pieces, rule = [200, 10, 1, 20], RULES[name]
    query, key, value = tokens(sum(pieces), seed=6, spread=2.0)
    store = new_store(name, 320, window_tokens=256)  # all stay in the window
    feed(store, (query, key, value), pieces)
    weights, expected, end = brute_force_weights(query, key), 0.0, 0
    votes_of = brute_force_counts(weights) if rule.above_average else weights
    for piece in pieces:
        end += piece
        voters = slice(max(end - piece, end - (rule.horizon or end)), end)
        votes = votes_of[:, voters].sum(1).view(N_KV_HEADS, -1, sum(pieces)).sum(1)
        left = {"h2o": 1, "snapkv": 1 - piece / 32, "tova": 0, "scissorhands": 1 - piece / 256}[name]
        expected = expected * max(left, 0) + (votes.mean(0) if rule.across_heads else votes)
    found = store.table.scores["window"][0, :, : sum(pieces)]
    torch.testing.assert_close(found.double(), expected.expand(N_KV_HEADS, -1), rtol=ROUNDING, atol=1e-12)


@pytest.mark.parametrize("name", VOTING)
def test_a_padded_batch_votes_as_its_sequences_do_alone(name):
    pieces, pads = [200, 1, 40], [77, 0, 9]  # how many tokens of each piece are padding in the first sequence
    sequences = [tokens(sum(pieces) - sum(pads)), tokens(sum(pieces), seed=1)]
    padded, lone = new_store(name, 128), [new_store(name, 128) for _ in sequences]
    for i, (piece, pad) in enumerate(zip(pieces, pads)):
        at = sum(pieces[:i]) - sum(pads[:i]), sum(pieces[:i])
        short, long = ([x[:, :, n : n + m] for x in y] for y, n, m in zip(sequences, at, (piece - pad, piece)))
        mask = torch.ones(2, 1, piece, at[1] + piece, dtype=torch.bool).tril(at[1])
        mask[0, ..., at[1] : at[1] + pad] = False
        padding = zip(short, (9.0, -9.0, 9.0))  # its queries would look at anything but its own keys
        together = [torch.cat([F.pad(x, (0, 0, pad, 0), value=fill), y]) for (x, fill), y in zip(padding, long)]
        feed(padded, together, [piece], mask)
        for store, part in zip(lone, (short, long)):
            feed(store, part, [part[0].shape[2]])
    for row, store in enumerate(lone):
        assert kept(padded, row) == kept(store)
        for part, alone in store.table.scores.items():
            together = padded.table.scores[part][row : row + 1]
            n = min(together.shape[-1], alone.shape[-1])
            torch.testing.assert_close(together[..., :n], alone[..., :n], rtol=ROUNDING, atol=1e-12)


@pytest.mark.parametrize("size", [300, 64, 1])
def test_under_uniform_attention_sums_keep_the_first_tokens_and_the_window(size):
    t, budget = 300, 128
    query, key, value = tokens(t, spread=0.0)
    store = new_store("h2o", budget)
    feed(store, (query, key, value), chunks(t, size))
    assert kept(store) == [list(range(96)) + list(range(256, 300))] * N_KV_HEADS


@pytest.mark.parametrize("heads, size", [("uniform", 300), ("uniform", 64), ("uniform", 1), ("adaptive", 300)])
def test_of_equal_scores_the_earlier_stay(heads, size):
    store = new_store("h2o", 192, heads=heads)
    store.rule = EQUAL
    feed(store, tokens(300), chunks(300, size))
    # 4 pages and a reservoir for each; where heads compete, the first takes all but the floor of one page of the other
    n_pages = (5, 5) if heads == "uniform" else (8, 2)
    assert kept(store) == [[*range(n * PAGE_TOKENS), *range(256, 300)] for n in n_pages]


def test_groups_are_cut_by_rank_and_hold_their_tokens_in_the_order_of_the_text():
    score = torch.tensor([3.0, 1.0, 3.0, 2.0]).repeat(24).view(1, 1, 96)
    order, mean, total = groups_by_score(RULES["h2o"], score)
    threes, twos, ones = ([i for i in range(96) if score[0, 0, i] == x] for x in (3, 2, 1))
    assert order[0, 0].tolist() == [threes[:32], sorted(threes[32:] + twos[:16]), sorted(twos[16:] + ones)]
    assert mean[0, 0].tolist() == [3.0, 2.5, 1.25] and total[0, 0].tolist() == [96.0, 80.0, 40.0]
    pooled = groups_by_score(RULES["snapkv"], torch.eye(96)[None, 40:41])  # one token's score reaches two on either side
    assert pooled[0][0, 0, 0].tolist() == [*range(27), *range(38, 43)]
    assert pooled[1][0, 0].tolist() == [5 / 32, 0, 0] and pooled[2][0, 0].tolist() == [1, 0, 0]


# Page counts


@settings(max_examples=100, deadline=None)
@given(shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), total=st.integers(0, 5000))
def test_whole_shares_add_up_and_are_within_one_of_the_exact_ones(shares, total):
    whole = whole_shares(shares, total)
    exact = np.array(shares) / sum(shares) * total
    assert sum(whole) == total and min(whole) >= 0
    assert (np.abs(whole - exact) < 1 + 1e-6).all()


def test_remainders_go_to_the_largest_then_to_the_earlier():
    assert whole_shares([1, 1, 1], 5) == [2, 2, 1]
    assert whole_shares([0.2, 0.5, 0.3], 4) == [1, 2, 1]  # 0.8, 2.0, 1.2
    assert whole_shares([0.5, 0.5], 0) == [0, 0]


@settings(max_examples=100, deadline=None)
@given(
    n_layers=st.integers(1, 48),
    pages=st.integers(4, 400),
    window=st.integers(0, 4),
    layers=st.sampled_from(["uniform", "pyramid"]),
)
def test_layers_share_their_pages_exactly(n_layers, pages, window, layers):
    recipe = Recipe("h2o", (pages + window) * PAGE_TOKENS, layers=layers, window_tokens=window * PAGE_TOKENS)
    counts = recipe.layer_pages(n_layers, 0)
    assert sum(counts) == n_layers * pages and min(counts) >= 2
    assert counts == sorted(counts, reverse=True)
    if layers == "uniform":
        assert set(counts) == {pages}
    elif n_layers > 1:  # from 1.5 to 0.5 times the mean
        assert abs(counts[0] - 1.5 * pages) < 1 and abs(counts[-1] - 0.5 * pages) < 1
    for fraction, context in ((0.25, 8192), (1.0, 4096), (0.01, 500)):
        counts = Recipe("h2o", fraction, layers=layers).layer_pages(n_layers, context)
        wanted = max(fraction * context, 160 if layers == "pyramid" else 96)
        assert sum(counts) == round(n_layers * (wanted - 32) / PAGE_TOKENS)


@settings(max_examples=60, deadline=None)
@given(pages=st.integers(0, 300), share=st.floats(0.05, 0.95))
def test_quotas_add_up(pages, share):
    two = Recipe("h2o", 128, tiers=((4, share), (2, 1 - share))).quota(pages)
    assert list(two) == [4, 2] and sum(two.values()) == pages and abs(two[4] - share * pages) <= 0.5 + 1e-6
    assert Recipe().quota(pages) == {DENSE: pages}


def best_units(scores: np.ndarray, n: int, taken=()) -> list[tuple]:
    """The n best of a list of (score, place) that are there and not taken; equal ones in the order of their places."""
    there = [place for place in np.ndindex(scores.shape) if scores[place] > -np.inf and place not in taken]
    return sorted(there, key=lambda place: (-scores[place], place))[:n]


some_scores = st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    values=some_scores, lead=st.sampled_from([0.0, 9.0]), n_heads=st.integers(1, 4), pages=st.integers(0, 12),
    adaptive=st.booleans(), floor=st.booleans(),
)  # fmt: skip
def test_winners_are_the_best_by_brute_force(values, lead, n_heads, pages, adaptive, floor):
    scores = np.resize(values, (2, n_heads, max(len(values) // n_heads, 1)))
    scores += lead * np.arange(n_heads)[:, None]  # with a lead the last heads would take all, but for the floor
    won = winners(torch.tensor(scores), pages, adaptive, floor).numpy()
    for row, found in zip(scores, won):
        expected = []
        for head in range(n_heads):
            n = pages if not adaptive else floor * (pages // 4)  # a quarter of its share
            expected += [(head, *place) for place in best_units(row[head], n)]
        if adaptive:
            expected += best_units(row, n_heads * pages - len(expected), expected)
            assert found.sum() == min(n_heads * pages, (row > -np.inf).sum())
        assert set(map(tuple, np.argwhere(found).tolist())) == set(expected)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), n_old=st.integers(0, 9), n_new=st.integers(0, 9), pages=st.integers(2, 12), data=st.data())
def test_precisions_fill_their_quotas_from_the_best_and_promote_nothing(seed, n_old, n_new, pages, data):
    adaptive = data.draw(st.booleans())
    quota = data.draw(st.sampled_from([{4: 1.0}, {4: 0.5, 2: 0.5}, {16: 0.2, 8: 0.3, 2: 0.5}, {8: 0.1, 4: 0.9}]))
    quota = dict(zip(quota, whole_shares(list(quota.values()), pages)))
    rng = np.random.default_rng(seed)
    units = rng.integers(0, 6, (2, 3, n_old + n_new)).astype(float)
    current = rng.choice(list(quota), (2, 3, n_old))
    won = winners(torch.tensor(units), pages, adaptive)
    bits = precisions(torch.tensor(units), won, current.astype(np.uint8), quota, adaptive)
    assert ((bits > 0) == won.numpy()).all() and set(np.unique(bits)) <= {0, *quota}
    assert (bits[..., :n_old] <= current).all()
    most = np.concatenate([current, np.full((2, 3, n_new), 99)], -1)
    for row in range(2):
        for part in [np.s_[row]] if adaptive else [np.s_[row, head] for head in range(3)]:
            left = np.where(won.numpy()[part], units[part], -np.inf)
            for precision, n in list(quota.items())[:-1]:
                chosen = best_units(np.where(most[part] >= precision, left, -np.inf), n * (3 if adaptive else 1))
                assert set(chosen) == set(map(tuple, np.argwhere(bits[part] == precision).tolist()))
                left[bits[part] == precision] = -np.inf


# What a store holds


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
@pytest.mark.parametrize("size", [1, 7, 64, 200])
@pytest.mark.parametrize("name", RULES)
def test_no_step_leaves_more_than_the_budget_and_a_page_per_head(name, size, heads):
    budget, t = 128, 400 if size > 1 else 230
    store, sequence = new_store(name, budget, heads=heads, tiers=((4, 0.5), (2, 0.5))), tokens(t)
    for i, piece in enumerate(chunks(t, size)):
        feed(store, [x[:, :, i * size :][:, :, :piece] for x in sequence], [piece])
        n_seen = i * size + piece
        n_kept = store.table.n_kept[0]
        assert (n_kept.mean() if heads == "adaptive" else n_kept.max()) < budget + PAGE_TOKENS
        assert n_kept.min() >= min(n_seen, 32)
        if n_seen < budget:  # at `budget` the third group leaves the window, and an old page may lose to it
            assert (n_kept == n_seen).all()
    assert (store.table.full >= 0).sum() == N_KV_HEADS * 2  # of four pages per head one is the window, one the reservoir's


def test_pyramids_spend_the_same_pages_on_other_layers():
    config = AutoConfig.for_model(
        "qwen2", num_hidden_layers=4, hidden_size=32, num_attention_heads=N_HEADS, num_key_value_heads=N_KV_HEADS
    )
    cache = build_cache("h2o", config, budget=192, layers="pyramid")
    for layer in cache.layers:
        feed(layer.store, tokens(400), [400])
    n_kept = [int(layer.store.table.n_kept[0, 0]) for layer in cache.layers]
    assert n_kept == [32 * n + 48 for n in cache.layers[0].store.recipe.layer_pages(4, 0)]
    assert n_kept == sorted(n_kept, reverse=True) and sum(n_kept) == 4 * (192 + 16)


@pytest.mark.parametrize("size", [41, 1])
@pytest.mark.parametrize(
    "keep, tiers", [(None, ((4, 1.0),)), ("streaming", ((4, 0.5), (2, 0.5))), ("keydiff", ((8, 0.3), (4, 0.3), (2, 0.4)))]
)
def test_a_token_is_quantised_once_per_precision(monkeypatch, keep, tiers, size):
    t, stored, original = 300, [], PagePool.store
    store, (query, key, value) = new_store(keep, keep and 224, tiers=tiers), tokens(t)

    def record(pool, bits, key, value, parents=None):
        pages = original(pool, bits, key, value, parents)
        stored.append((bits, torch.cat([key, value], -1), torch.cat(pool.read(pages), -1)))
        return pages

    monkeypatch.setattr(PagePool, "store", record)
    feed(store, (query, key, value), chunks(t, size))
    exact = torch.cat([key, value], -1)[0]
    names = {row.numpy().tobytes(): (DENSE, (head, i)) for head in range(N_KV_HEADS) for i, row in enumerate(exact[head])}
    seen, steps = Counter(), Counter()
    for bits, put, read in stored:
        for row, after in zip(put.flatten(0, 1), read.flatten(0, 1)):
            before, token = names[row.numpy().tobytes()]  # nothing but an original, or what a page read back as
            assert before > bits or before == DENSE
            seen[bits, token] += 1
            steps[before, bits] += 1
            names.setdefault(after.numpy().tobytes(), (bits, token))
    assert max(count for (bits, _), count in seen.items() if bits != DENSE) == 1
    if keep:
        assert steps[DENSE, tiers[0][0]] and steps[tiers[0][0], tiers[1][0]]  # some pages were demoted
    else:
        assert steps == {(DENSE, 4): N_KV_HEADS * 256}


# Recipes


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(keep="h3o", budget=128), "keep: expected one of None, streaming, h2o, .*; got 'h3o'"),
        (dict(layers="cone"), "layers: expected one of uniform, pyramid; got 'cone'"),
        (dict(heads="greedy"), "heads: expected one of uniform, adaptive; got 'greedy'"),
        (dict(tiers=((3, 1.0),)), r"tiers: expected .*; got \(3,\)"),
        (dict(keep="h2o", budget=128, tiers=((2, 0.5), (4, 0.5))), r"tiers: expected .*\(4, 2\); got \(2, 4\)"),
        (dict(keep="h2o", budget=128, tiers=((4, 0.5), (4, 0.5))), r"tiers: expected .*; got \(4, 4\)"),
        (dict(keep="h2o", budget=128, tiers=()), r"tiers: expected .*got \(\)"),
        (dict(tiers=((4, 0.9),)), r"tiers: expected positive shares that sum to 1, got \(0.9,\)"),
        (dict(keep="h2o", budget=128, tiers=((4, 1.5), (2, -0.5))), r"tiers: expected positive shares .* got \(1.5, -0.5\)"),
        (dict(tiers=((4, float("nan")),)), r"tiers: expected positive shares that sum to 1, got \(nan,\)"),
        (dict(tiers=((4, 0.5), (2, 0.5))), r"tiers: expected one precision .*got.*\(4, 2\)"),
        (dict(keep="h2o"), "budget: expected one together with a keep rule.*got.*None"),
        (dict(budget=128), "budget: expected .* none without.*got.*128"),
        (dict(window_tokens=-32), "window_tokens: expected a multiple of 32, got -32"),
        (dict(window_tokens=40), "window_tokens: expected a multiple of 32, got 40"),
        (dict(keep="h2o", budget=0), "budget: expected a positive token count or fraction, got 0"),
        (dict(keep="h2o", budget=-0.5), "budget: expected a positive token count or fraction, got -0.5"),
    ],
    ids=str,
)
def test_what_a_recipe_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_budgets_too_small_for_their_layers_are_refused_when_the_cache_is_built():
    for layers, least in (("uniform", 96), ("pyramid", 160)):
        assert Recipe("h2o", least, layers=layers).layer_pages(4, 0)
        with pytest.raises(ValueError, match=f"budget: {least - 33} tokens leave a layer .* give {least} or more"):
            paged_stores(Recipe("h2o", least - 33, layers=layers), PagePool(HEAD_DIM), range(4), 0)
    config = AutoConfig.for_model("llama", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(ValueError, match="budget: 50 tokens .* give 96 or more"):
        build_cache("h2o", config, budget=50)
    with pytest.raises(ValueError, match="bugdet: expected one of keep, budget, .* for h2o"):
        build_cache("h2o", config, bugdet=128)
    with pytest.raises(ValueError, match="budget: v1 has no pages"):
        build_cache("v1", config, budget=128)


def test_every_precision_is_a_recipe_of_its_own():
    for bits in PRECISIONS:
        store = new_store(None, None, tiers=((bits, 1.0),))
        feed(store, tokens(100), [100])
        pages = store.table.full[store.table.full >= 0]
        assert store.pool.bits[pages].tolist() == [bits] * (2 * N_KV_HEADS)
