"""Where a decode step's time goes: projections, cache update, quantise, dequantise, attention, MLP, other."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from kvlib.cache.attention import attention_through_cache
from kvlib.measure.clock import milliseconds, now
from kvlib.measure.decoder import Decoder, prompt_ids, warm_up
from kvlib.model.load import Model

PHASES = ("projections", "cache update", "quantise", "dequantise", "attention", "MLP", "other")
PROJECTIONS = ("c_attn", "c_proj", "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")


class Stopwatch:
    """Self time by phase: entering a phase stops the clock of the one around it, so the phases sum to the whole."""

    def __init__(self, device: str):
        self.device, self.milliseconds, self.open = device, defaultdict(float), []
        self.mark = 0.0

    def _charge(self) -> None:
        time = now(self.device)
        if self.open:
            self.milliseconds[self.open[-1]] += 1e3 * (time - self.mark)
        self.mark = time

    def timed(self, phase: str, function: Callable) -> Callable:
        """The function, its own time charged to `phase`."""

        def inside(*args, **kwargs):
            self._charge()
            self.open.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self.open.pop()

        return inside


def _parts(decoder: Decoder) -> Iterator[tuple[object, str, str]]:
    """(object, name of its method, phase) for every part of a model and its cache that is timed."""
    for name, module in decoder.network.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf == "mlp":
            yield module, "forward", "MLP"
        elif leaf in PROJECTIONS and parent.endswith("attn"):
            yield module, "forward", "projections"
    layers = decoder.cache.kv_layers.values() if decoder.cache else ()
    names = {"append": "cache update", "quantize": "quantise", "dequantize": "dequantise", "attend": "attention"}
    for thing in (*(decoder.cache.stores if decoder.cache else ()), *(layer.maps for layer in layers if layer.maps)):
        for name, phase in names.items():
            if hasattr(thing, name):
                yield thing, name, phase


@contextlib.contextmanager
def phases_of(decoder: Decoder) -> Iterator[Stopwatch]:
    """Time the parts of this decoder's steps; methods are wrapped on these objects alone and restored at the end."""
    watch, parts = Stopwatch(decoder.network.device.type), list(_parts(decoder))
    try:
        for thing, name, phase in parts:
            setattr(thing, name, watch.timed(phase, getattr(thing, name)))
        yield watch
    finally:
        for thing, name, _ in parts:
            thing.__dict__.pop(name, None)


def measure_phases(model: Model, method: str, context_tokens: int, n_steps: int = 32, **options) -> list[dict]:
    """Median self time of each phase over `n_steps` decode steps up to `context_tokens`; one row a phase.

    Timed and plain steps take turns on two decoders: -> phase, phase_ms, share (of the phases' sum), timed_ms and
    plain_ms (median step with and without the stopwatch). The phases should sum to plain_ms within 5 %. Without a
    cache, and in layers that slide, the attention is torch's own, inside "other".
    """
    model.check_context(context_tokens)
    with attention_through_cache(model.network):
        warm_up(model, method)
        prompt = prompt_ids(model, context_tokens - n_steps)
        timed, plain = (Decoder(model, method, prompt, context_tokens, **options) for _ in range(2))
        timed.step(), plain.step()
        steps, timed_ms, plain_ms = [], [], []
        for _ in range(n_steps):
            plain_ms.append(milliseconds(model.device, plain.step))
            with phases_of(timed) as watch:
                timed_ms.append(milliseconds(model.device, watch.timed("other", timed.step)))
            steps.append([watch.milliseconds[phase] for phase in PHASES])
    medians = np.median(steps, axis=0)
    total = {"timed_ms": float(np.median(timed_ms)), "plain_ms": float(np.median(plain_ms))}
    return [
        {"phase": phase, "phase_ms": float(ms), "share": float(ms / medians.sum()), **total}
        for phase, ms in zip(PHASES, medians)
    ]
