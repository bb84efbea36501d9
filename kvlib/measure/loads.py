"""One method under one load, context × batch, alone on the machine: its time, its throughput, its bytes."""

from kvlib.measure.decode import measure_decode
from kvlib.measure.memory import measure_memory
from kvlib.model.load import Model

TIMES = [f"{time}{end}" for time in ("ttft_ms", "tpot_ms") for end in ("", "_low", "_high")]


def measure_load(
    model: Model, method: str, context_tokens: int, batch: int, n_steps: int = 12, n_prefills: int = 3, **options
) -> dict[str, float]:
    """TTFT, TPOT and bytes of `batch` sequences decoded together at the end of so long a context.

    -> ttft_ms and tpot_ms with quartiles, tokens_per_s over the batch, and what `measure_memory` tells. Methods do not take
    turns here: what is left of the memory would depend on the others. Raises what the allocator raises.
    """
    [row] = measure_decode(model, [method], context_tokens, batch, n_steps, n_prefills, **options)
    memory = measure_memory(model, method, context_tokens, batch, **options)
    return {column: row[column] for column in (*TIMES, "tokens_per_s")} | memory
