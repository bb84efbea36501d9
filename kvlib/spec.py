"""What the arithmetic says before anything is measured: bytes, FLOPs and floors of a model, in closed form."""

import math
from collections.abc import Callable

from kvlib.cache.keep import RULES
from kvlib.cache.methods import get_method, override
from kvlib.cache.recipe import Recipe
from kvlib.cache.sharing import composed, owners_of
from kvlib.cache.table import ROWS_AT_ONCE
from kvlib.dimensions import ModelSpec
from kvlib.kernels.operand import DENSE, PAGE_TOKENS

FEWEST_FILED = 512  # tokens of all sequences that are filed at once, be it a piece of a prompt
FREE_PAGE_BYTES = 56  # of each page that is not yet taken, in the pool's lists of numbers; measured
ENDLESS_TOKENS = 2**40


def owners(spec: ModelSpec, method: str, layer_map: str | None = None) -> set[int]:
    """The layers that have a store."""
    asked = owners_of(layer_map or get_method(method).layer_map, spec.n_layers, spec.sliding_layers)
    return set(composed(asked, spec.layer_owners)) - set(spec.sliding_layers)


def sliding_bytes(spec: ModelSpec, batch: int, tokens: int) -> int:
    """Bytes of the layers that slide, whatever the method: of each a window's keys and values, and its length as a tensor.

    So much is held once a token was decoded; until then, transformers keeps all that the model read at once.
    """
    window = batch * spec.n_kv_heads * min(tokens, spec.window_tokens) * 2 * spec.head_dim * spec.dtype.itemsize
    return len(spec.sliding_layers) * (window + 8)


def held_bytes(
    spec: ModelSpec, method: str, batch: int, tokens: int, layer_map: str | None = None, half: str = "both", **recipe
) -> int:
    """Bytes the cache keeps between steps for `batch` sequences with room for `tokens` tokens each; 0 without a cache.

    Layers that share one half only keep the other. An alignment's maps are weights, and not counted.
    """
    chosen = get_method(method)
    if chosen.store is None:
        return 0
    n_owners = len(owners(spec, method, layer_map))
    if chosen.recipe:
        dimensions = n_owners, spec.n_kv_heads, spec.head_dim, spec.dtype
        return override(method, recipe).held_bytes(*dimensions, batch, tokens) + sliding_bytes(spec, batch, tokens)
    room = -(-tokens // chosen.store.block_tokens) * chosen.store.block_tokens
    of_layer = batch * spec.n_kv_heads * room * chosen.store.bytes_per_token(spec.head_dim, spec.dtype)
    halves = (half != "both") * (spec.n_full - n_owners)
    return n_owners * of_layer + halves * of_layer // 2 + sliding_bytes(spec, batch, tokens)


def n_readers(spec: ModelSpec, method: str) -> int:
    """Layers that read another's store through maps; 0 for methods that align nothing."""
    return get_method(method).aligned * (spec.n_full - len(owners(spec, method)))


def maps_params(spec: ModelSpec, method: str) -> int:
    """Numbers in the maps of an aligned method whose readers read whole layers: of queries, of outputs, and biases."""
    wide = spec.n_kv_heads * spec.head_dim
    return n_readers(spec, method) * spec.head_dim * ((spec.n_kv_heads + spec.n_heads) * wide + spec.n_heads)


def filing_bytes(spec: ModelSpec, recipe: Recipe, batch: int) -> int:
    """Bytes that one layer's tokens take on their way from the window to their pages: a page each of ROWS_AT_ONCE sequences.

    Keys and values are read and joined: two copies. Where tokens compete, they are also joined with the reservoir, gathered
    by page and stored: five. Where pages can fall to a lower tier, these are read: six. Codes are made from a copy in fp32.
    """
    copies, quantised = 5 if recipe.keep else 2, min(bits for bits, _ in recipe.tiers) < DENSE
    per_number = (copies + (len(recipe.tiers) > 1)) * spec.dtype.itemsize + 4 * quantised
    n_tokens = max(min(batch, ROWS_AT_ONCE) * PAGE_TOKENS, FEWEST_FILED)
    return 2 * n_tokens * spec.n_kv_heads * spec.head_dim * per_number


def step_workspace_bytes(
    spec: ModelSpec, method: str, batch: int, tokens: int, layer_map: str | None = None, half: str = "both", **recipe
) -> int:
    """Bytes a decode step needs besides the cache, in its largest moment: attention of one layer, or MLP, or logits.

    A naive quantised store materialises one layer's keys and values and, a head at a time, its codes in fp32 and their
    product. With pages that kernels read it is either the moment when tokens leave the window, while the pool still lists
    its free pages, or that when a keep rule's votes and the logits behind them exist, fp32 for every token that the block
    table has room for. Options as in `held_bytes`.
    """
    activations = batch * spec.dtype.itemsize * (4 * spec.hidden + spec.mlp_matrices * spec.mlp_hidden)
    activations = max(activations, sliding_bytes(spec, batch, tokens) // max(len(spec.sliding_layers), 1))  # a window, moved on
    logits = batch * spec.vocabulary * spec.dtype.itemsize
    chosen = get_method(method)
    if chosen.store is not None and chosen.store.materialises:
        head = batch * tokens * spec.head_dim
        return max(activations, logits, 2 * spec.n_kv_heads * head * spec.dtype.itemsize + 2 * head * 4)
    if not chosen.recipe:
        return max(activations, logits)
    chosen = override(method, recipe)
    n_owners = len(owners(spec, method, layer_map))
    rooms = [chosen.room(limit, tokens) for limit in chosen.layer_pages(n_owners, tokens) or [None] * n_owners]
    columns = chosen.most_per_head(max(kept for kept, _ in rooms), spec.n_kv_heads) + chosen.window_pages + 2
    voters = (spec.n_heads + spec.n_kv_heads) * (chosen.keep is not None and RULES[chosen.keep].needs_votes)
    free = FREE_PAGE_BYTES * batch * spec.n_kv_heads * sum(sum(pages.values()) for _, pages in rooms)
    votes = batch * voters * columns * PAGE_TOKENS * 4
    return max(activations, logits, votes, filing_bytes(spec, chosen, batch) + free)


def largest(fits: Callable[[int], bool], guess: int, within: int = 1) -> int:
    """The largest n >= 0 with fits(n), or up to `within` - 1 less, for a monotone `fits`.

    Away from `guess` in steps that double, then by bisection: a right guess takes two calls.
    """
    guess = n = max(guess, 1)
    low, high, step = 0, math.inf, within
    while high - low > within:
        low, high = (n, high) if fits(n) else (low, n)
        if high == math.inf or low == 0 and guess > step:
            n, step = guess + (step if low else -step), 2 * step
        else:
            n = (low + high) // 2
    return low


def predicted_bytes(spec: ModelSpec, method: str, batch: int, context_tokens: int, **options) -> int:
    """The closed form: bytes of a full cache, and of what a decode step takes besides. Raises ValueError for no cache."""
    if get_method(method).store is None:
        raise ValueError(f"capacity: {method} keeps nothing between steps, so any batch fits; choose a method with a cache.")
    held = held_bytes(spec, method, batch, context_tokens, **options)
    return held + step_workspace_bytes(spec, method, batch, context_tokens, **options)


def predicted_max_batch(spec: ModelSpec, method: str, context_tokens: int, budget_bytes: int, **options) -> int:
    """The closed form's largest batch: cache and one decode step's workspace within the budget."""
    return largest(lambda n: predicted_bytes(spec, method, n, context_tokens, **options) <= budget_bytes, 1)


def predicted_max_context(spec: ModelSpec, method: str, batch: int, budget_bytes: int, **options) -> int:
    """The closed form's largest context in tokens, a whole number of pages. Raises ValueError if there is none."""
    if predicted_bytes(spec, method, batch, ENDLESS_TOKENS, **options) <= budget_bytes:
        raise ValueError(f"capacity: {method} does not grow with the context, so any fits; make its budget a fraction.")
    return PAGE_TOKENS * largest(
        lambda n: predicted_bytes(spec, method, batch, n * PAGE_TOKENS, **options) <= budget_bytes, 1
    )


def forward_flops(
    spec: ModelSpec, batch: int, new_tokens: int, past_tokens: int = 0, logit_tokens: int = 1, kept_tokens: int | None = None
) -> dict[str, int]:  # fmt: skip
    """Matrix-product FLOPs (2 per multiply-add) of one forward pass, by phase.

    Attention is counted over all `past + new` keys for every query, as the dense products are; a causal kernel may
    skip up to half of the new x new part. Of the past, layers that slide see what is left in their window, the others
    `kept_tokens`, if not all.
    """
    tokens, kept = batch * new_tokens, past_tokens if kept_tokens is None else kept_tokens
    sliding = len(spec.sliding_layers) * (min(past_tokens, spec.window_tokens - 1) + new_tokens)
    keys = spec.n_full * (kept + new_tokens) + sliding
    return {
        "projections": spec.n_layers * 2 * tokens * spec.projection_params,
        "attention": 4 * tokens * keys * spec.n_heads * spec.head_dim,
        "mlp": spec.n_layers * 2 * tokens * spec.mlp_params,
        "logits": 2 * batch * logit_tokens * spec.hidden * spec.vocabulary,
    }


def tokens_in_sight(spec: ModelSpec, method: str, context: int, **recipe) -> int:
    """Tokens of a context that a step attends to, on average over layers that do not slide: all, or a keep rule's budget."""
    chosen = get_method(method).recipe and override(method, recipe)
    limits = chosen.layer_pages(len(owners(spec, method)), context) if chosen else None
    if limits is None:
        return context
    return sum(min(context, (n + chosen.window_pages) * PAGE_TOKENS) for n in limits) // len(limits)


def decode_step_flops(spec: ModelSpec, method: str, batch: int, context: int, **recipe) -> int:
    """FLOPs of making one token at a context of so many (the new one included); aligned readers see whole layers."""
    sight, wide = tokens_in_sight(spec, method, context, **recipe), spec.n_kv_heads * spec.head_dim
    past, kept = (context - 1, sight - 1) if get_method(method).store else (0, 0)
    of_reader = 4 * spec.n_heads * (wide * spec.head_dim + sight * (wide - spec.head_dim))  # maps, longer heads
    flops = forward_flops(spec, batch, context - past, past, kept_tokens=kept)
    return sum(flops.values()) + batch * n_readers(spec, method) * of_reader


def decode_step_bytes(spec: ModelSpec, method: str, batch: int, context: int, **recipe) -> int:
    """Bytes that must cross memory for one token: every weight once, and every cached byte once per layer reading it.

    A lower bound: activations, embeddings not looked up and re-reads are left out. A naive store also writes and reads
    the dequantised copy, which is counted: codes in, copy out, copy in again. Pages are counted as a kernel that reads codes
    would read them: every held byte once.
    """
    weights = spec.weight_bytes + maps_params(spec, method) * spec.dtype.itemsize
    chosen = get_method(method)
    if chosen.store is None:
        return weights
    if chosen.recipe:
        return weights + held_bytes(spec, method, batch, context, **recipe)
    readers = spec.n_full * batch * spec.n_kv_heads * context
    dense = 2 * spec.head_dim * spec.dtype.itemsize
    stored = chosen.store.bytes_per_token(spec.head_dim, spec.dtype)
    of_full = readers * (stored + 2 * dense * chosen.store.materialises)
    return weights + of_full + sliding_bytes(spec, batch, context)


def fewest_step_ms(
    spec: ModelSpec, method: str, batch: int, context: int, flops_per_s: float, bytes_per_s: float
) -> float:
    """The roofline's floor for one decode step in ms, given the machine's measured ceilings."""
    compute = decode_step_flops(spec, method, batch, context) / flops_per_s
    return 1e3 * max(compute, decode_step_bytes(spec, method, batch, context) / bytes_per_s)
