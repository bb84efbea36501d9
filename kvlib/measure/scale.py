"""Users per GPU, on paper: from a model's published dimensions, a machine's ceilings and the closed forms of a method."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from kvlib.dimensions import ModelSpec
from kvlib.model.weights import build_random
from kvlib.spec import decode_step_bytes, decode_step_flops, held_bytes, predicted_max_batch


@dataclass(frozen=True)
class Machine:
    """What one GPU, or CPU, can do: memory for weights and caches, bytes and FLOPs per second, as measured or as published."""

    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Service:
    """How many users one model serves at a time, and how fast; bytes are those of one GPU.

    `binds`: what stands in the way of more tokens per second, "memory" if not even one user fits, else "bandwidth" or
    "compute". Without users the step takes no time: `step_ms` is NaN.
    """

    users: int
    step_ms: float
    tokens_per_s_per_user: float
    tokens_per_s: float
    binds: str
    weight_bytes: int
    cache_bytes_per_user: int


def published_spec(config: dict, dtype: torch.dtype = torch.bfloat16) -> ModelSpec:
    """The dimensions of a model that is never loaded; `config` holds `model_type` and what its config.json says."""
    return ModelSpec.of(build_random(config, dtype, "meta"))


def one_gpu(spec: ModelSpec, ways: int) -> ModelSpec:
    """The share of one GPU under tensor parallelism: weights and heads are split `ways` ways.

    Where there are fewer KV heads than GPUs, each is on several of them, and a GPU's share of the cache shrinks no further.
    Raises ValueError unless `ways` divides the query heads.
    """
    if ways < 1 or spec.n_heads % ways:
        raise ValueError(f"ways: expected a divisor of the model's {spec.n_heads} query heads, got {ways!r}.")
    split = "n_heads", "n_kv_heads", "mlp_hidden", "vocabulary", "n_params"
    return dataclasses.replace(spec, **{name: -(-getattr(spec, name) // ways) for name in split})


def step_times(spec: ModelSpec, machine: Machine, method: str, batch: int, context: int, **recipe) -> dict[str, float]:
    """Ms that a decode step takes at least, {"bandwidth": for its bytes, "compute": for its FLOPs}."""
    return {
        "bandwidth": 1e3 * decode_step_bytes(spec, method, batch, context, **recipe) / machine.bandwidth_bytes_per_s,
        "compute": 1e3 * decode_step_flops(spec, method, batch, context, **recipe) / machine.flops_per_s,
    }


def users_per_gpu(
    spec: ModelSpec, machine: Machine, method: str, context: int, ways: int = 1, efficiency: float = 1.0, **recipe
) -> Service:
    """As many users as fit beside the weights on `ways` GPUs, each with a context of `context` tokens, decoding together.

    The step is the roofline's floor over `efficiency`, a floor over the step measured on some machine: see `compare`. What
    the GPUs tell each other is not counted. `recipe` replaces fields of a paged method's. Raises ValueError for an
    efficiency or a number of ways that cannot be.
    """
    if not efficiency > 0:
        raise ValueError(f"efficiency: expected the floor over the measured step, above 0; got {efficiency!r}.")
    share = one_gpu(spec, ways)
    users = predicted_max_batch(share, method, context, machine.memory_bytes - share.weight_bytes, **recipe)
    times = step_times(share, machine, method, users, context, **recipe) if users else {"memory": math.nan}
    binds = max(times, key=times.get)
    step_ms = times[binds] / efficiency
    per_user = 1e3 / step_ms if users else 0.0
    each = held_bytes(share, method, 1, context, **recipe)
    return Service(users, step_ms, per_user, users * per_user, binds, share.weight_bytes, each)


def compare(spec: ModelSpec, machine: Machine, rows: list[dict], efficiency: float = 1.0, **recipe) -> list[dict]:
    """The calculator against measured steps: each row with `predicted_ms` and `predicted_x`, predicted over measured.

    Rows hold method, batch, context_tokens and tpot_ms; `machine` holds ceilings measured where they were. With an
    efficiency of 1, `predicted_x` is the efficiency of that row.
    """
    compared = []
    for row in rows:
        times = step_times(spec, machine, row["method"], row["batch"], row["context_tokens"], **recipe)
        predicted = max(times.values()) / efficiency
        compared.append(row | {"predicted_ms": predicted, "predicted_x": predicted / row["tpot_ms"]})
    return compared
