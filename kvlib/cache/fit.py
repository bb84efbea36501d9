"""Fit an alignment: least squares on calibration text, in one pass of the model through a cache that shares already.

Each reader is fitted to what it would have computed from keys and values of its own, given what it meets in a model whose
earlier layers share: later layers so make up for the errors of earlier ones. Keys first (ridge regression of the reader's
keys on the owner's, centred, as softmax does not see a constant), then outputs, given the mapped queries. Where positions are
rotations, the map of the queries has to commute with them: it is one complex number per frequency and pair of KV heads.
"""

import torch
from torch import Tensor

from kvlib.cache.adapter import KVCache, KVLayer, SlidingLayer
from kvlib.cache.alignment import SPANS, Alignment, LayerMaps, across, checksum
from kvlib.cache.architecture import rotary_channels, sliding_layers
from kvlib.cache.attention import attention_through_cache, dense_attention, long_head
from kvlib.cache.dense import DenseStore
from kvlib.cache.sharing import HALVES

RIDGE = 1e-3  # of the mean variance of a regressor


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Least squares y [..., n, q] from x [..., n, p] -> [..., p, q], real or complex, with a little weight decay."""
    gram = (x.mH @ x).to(torch.complex128 if x.is_complex() else torch.float64)
    decay = RIDGE * gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=x.device)
    factor = torch.linalg.cholesky(gram + decay * eye)  # LU would pivot, which MKL 2025 gets wrong on two threads
    return torch.cholesky_solve((x.mH @ y).to(gram.dtype), factor).to(x.dtype)


def rows(x: Tensor) -> Tensor:
    """[B, H, T, C] -> [H, B T, C]."""
    return x.transpose(0, 1).flatten(1, 2)


def centred(x: Tensor) -> Tensor:
    """[B, H, T, C], less the mean over each sequence."""
    return x - x.mean(2, keepdim=True)


def key_map(owner: Tensor, own: Tensor, span: str, n_rotary: int) -> Tensor:
    """What turns the owner's keys [B, H_kv, T, D] into the reader's, per KV head of the reader: [H_kv, C, D].

    The first `n_rotary` channels, which positions rotate, and the others are mapped apart.
    """
    n_heads, dim = own.shape[1], own.shape[-1]
    joined = own.new_zeros(n_heads, n_heads if span == "layer" else 1, dim, dim)
    for first, last, fit in ((0, n_rotary, rotary_key_map), (n_rotary, dim, plain_key_map)):
        if first < last:
            found = fit(owner[..., first:last], own[..., first:last], span)
            joined[..., first:last, first:last] = found.unflatten(1, (-1, last - first))
    return joined.flatten(1, 2)


def plain_key_map(owner: Tensor, own: Tensor, span: str) -> Tensor:
    """`key_map` where no channel is rotated."""
    source = long_head(owner) if span == "layer" else owner
    return ridge(rows(centred(source)), rows(centred(own)))


def rotary_key_map(owner: Tensor, own: Tensor, span: str) -> Tensor:
    """`key_map` where channels f and f + D / 2 are one complex number that positions rotate."""
    x, y = (torch.complex(*(half.contiguous() for half in rows(k).chunk(2, -1))) for k in (owner, own))  # [H_kv, n, F]
    if span == "layer":
        found = ridge(x.permute(2, 1, 0), y.permute(2, 1, 0)).permute(1, 2, 0)  # [from, to, F]
    else:
        x, y = (z.permute(2, 0, 1)[..., None] for z in (x, y))  # [F, H_kv, n, 1]
        found = torch.diag_embed(ridge(x, y)[..., 0, 0]).permute(1, 2, 0)
    real, imaginary = (torch.diag_embed(part.contiguous()) for part in (found.real, found.imag))  # [from, to, F, F]
    blocks = torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)  # [from, to, D, D]
    if span == "layer":
        return blocks.transpose(0, 1).flatten(1, 2)
    return blocks.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def factors(matrix: Tensor, rank: int | None) -> list[Tensor]:
    """[H, C, D] itself, or the two factors of its best approximation of this rank; rounded to bf16, as they are saved."""
    if rank is not None and rank < min(matrix.shape[-2:]):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return [x.bfloat16().to(matrix.dtype) for x in (u[..., :rank] * s[..., None, :rank], v[..., :rank, :])]
    return [matrix.bfloat16().to(matrix.dtype)]


def output_map(fetched: Tensor, wanted: Tensor, rank: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """What turns what a head fetched [B, H, T, C] into what it wanted [B, H, T, D]: factors of [H, C, D], and a bias [H, D]."""
    x, y = rows(fetched.float()), rows(wanted.float())
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    found, mapped = factors(ridge(x - mean_x, y - mean_y), rank), mean_x
    for factor in found:
        mapped = mapped @ factor
    return found, [(mean_y - mapped)[:, 0].bfloat16().float()]


class FittingLayer(KVLayer):
    """A reader that knows its own keys and values too, and fits its maps before it attends for the first time."""

    def __init__(self, store, writes: bool, half: str, span: str, rank: int | None, n_rotary: int):
        super().__init__(store, writes)
        self.half, self.span, self.rank, self.n_rotary = half, span, rank, n_rotary

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.own = key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        (own_key, own_value), (key, _) = self.own, self.store.read()
        wide, queries, outputs, bias = across(self.half, self.span), [], [], []
        if self.half != "values":
            found = key_map(key.float(), own_key.float(), self.span, self.n_rotary).mT
            queries = [x.to(query.dtype) for x in factors(found, self.rank)]
        if self.half != "keys":
            fetched = LayerMaps(wide, queries, [], []).attend(self.store, query, mask, scaling)
            wanted = dense_attention(query, own_key, own_value, mask, scaling)
            outputs, bias = ([x.to(query.dtype) for x in part] for part in output_map(fetched, wanted, self.rank))
        self.maps = LayerMaps(wide, queries, outputs, bias)
        return super().attend(query, mask, scaling)


@torch.no_grad()
def fit_alignment(
    network, owners: tuple[int, ...], ids: Tensor, *, half: str = "both", span: str = "layer", rank: int | None = None
) -> Alignment:
    """Fit the maps of all readers of a layer map to calibration text, ids [n, T], read in one pass.

    `half` is what is shared: "both", "keys" or "values". `rank` bounds the rank of every map. Keys and values of all of the
    text are in memory at once. Raises ValueError for options that are not among these.
    """
    for where, given, allowed in (("half", half, HALVES), ("span", span, SPANS)):
        if given not in allowed:
            raise ValueError(f"{where}: expected one of {', '.join(allowed)}; got {given!r}.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}.")
    n_rotary, sliding, layers = rotary_channels(network.config), sliding_layers(network.config), []
    for layer, owner in enumerate(owners):
        if layer in sliding:
            layers.append(SlidingLayer(network.config.sliding_window))
            continue
        if layer == owner:
            layers.append(KVLayer(DenseStore(ids.shape[1])))
            continue
        store = layers[owner].store if half == "both" else layers[owner].store.lend(half)
        layers.append(FittingLayer(store, half != "both", half, span, rank, n_rotary))
    with attention_through_cache(network):
        network(ids.to(network.device), past_key_values=KVCache(layers), logits_to_keep=1)
    maps = {layer: fitted.maps for layer, fitted in enumerate(layers) if isinstance(fitted, FittingLayer)}
    return Alignment(tuple(owners), half, span, checksum(network), maps)
