"""One batch being decoded, a step at a time, with any method: what every measurement of time and bytes runs."""

import numpy as np
import torch
from torch import Tensor

from kvlib.cache.adapter import PEERS, transformers_cache
from kvlib.cache.methods import build_cache
from kvlib.model.load import Model

WARM_UP_STEPS = 3
PREFILL_TOKENS = 2**14  # of all sequences, read in one pass; a longer prompt is read in pieces


def prompt_ids(model: Model, n_tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    """[B, n] ids: stretches of held-out text, or random ids for a model without a tokenizer (time does not depend on them)."""
    rng = np.random.default_rng(seed)
    if model.weights == "random":
        return torch.from_numpy(rng.integers(0, model.spec.vocabulary, (batch, n_tokens))).to(model.device)
    ids = model.held_out_ids
    starts = rng.integers(0, len(ids) - n_tokens, batch)
    return torch.tensor([ids[start : start + n_tokens] for start in starts], device=model.device)


class Decoder:
    """Greedy decoding of one batch with one method, a step at a time; use it inside `attention_through_cache`.

    `method` is one of METHODS, or one of transformers' own caches in PEERS.
    """

    def __init__(self, model: Model, method: str, ids: Tensor, capacity_tokens: int, **options):
        self.network, self.ids = model.network, ids
        if method in PEERS:
            self.cache = transformers_cache(method, model.network.config, capacity_tokens)
        else:
            self.cache = build_cache(method, model.network, capacity_tokens=capacity_tokens, **options)

    @torch.inference_mode()
    def step(self) -> None:
        """Read what is new (at first the whole prompt) and append the likeliest next token to `ids` [B, n]."""
        self.read()

    def settle(self) -> None:
        """What must come between the prompt and the first step that is timed: nothing, unless steps are compiled."""

    def read(self) -> None:
        """A step, in whatever mode torch is."""
        if self.cache is None:
            logits = self.network(self.ids, use_cache=False, logits_to_keep=1).logits
        else:
            new = self.ids[:, self.cache.get_seq_length() :]
            for piece in new.split(max(PREFILL_TOKENS // len(new), 1), 1):
                logits = self.network(piece, past_key_values=self.cache, logits_to_keep=1).logits
        self.append(logits)

    def append(self, logits: Tensor) -> None:
        """Put the likeliest token after logits [B, t, vocabulary] behind `ids`."""
        self.ids = torch.cat([self.ids, logits[:, -1:].argmax(-1)], 1)


def warm_up(model: Model, method: str, batch: int = 1) -> None:
    """A few steps that nobody times."""
    decoder = Decoder(model, method, prompt_ids(model, 16, batch), 16 + WARM_UP_STEPS)
    for _ in range(WARM_UP_STEPS):
        decoder.step()
