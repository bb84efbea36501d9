"""A context read once through a cache, then questions asked of it: the cache never knows what will be asked.

A question inside the compressed window flatters methods that score tokens by the newest queries, so it stays outside.
"""

import torch

from kvlib.cache.adapter import KVCache
from kvlib.cache.methods import build_cache
from kvlib.model.load import Model

SENTINEL = "(context and question)"


def prompt_parts(model: Model, context: str, question: str) -> tuple[str, str]:
    """A prompt in two texts, to be encoded apart: what is read and compressed first, and what is then asked.

    With a chat template the context opens the user's turn and the question closes it, so that the first text is the same
    for every question; without one, plain text ends in a cue. Raises ValueError if the template does not show the
    user's message exactly once.
    """
    if not model.tokenizer.chat_template:
        return context, f"\n\nQuestion: {question}\nAnswer:"
    message = {"role": "user", "content": SENTINEL}
    rendered = model.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    if rendered.count(SENTINEL) != 1:
        raise ValueError(
            f"prompt_parts: expected a chat template that shows the user's message once, got it {rendered.count(SENTINEL)} "
            f"times from {model.name}; set model.tokenizer.chat_template to None to ask in plain text."
        )
    head, tail = rendered.split(SENTINEL)
    return head + context, f"\n\n{question}{tail}"


@torch.no_grad()
def read_context(model: Model, method: str, context_ids: list[int], **options) -> KVCache:
    """A fresh cache of this method, built with `options`, that has read the context; use inside `attention_through_cache`.

    A budget that is a fraction is one of the context. Raises ValueError for a context longer than the model allows, and for
    v0, which keeps nothing to ask.
    """
    model.check_context(len(context_ids))
    cache = build_cache(method, model.network, **{"capacity_tokens": len(context_ids)} | options)
    if cache is None:
        raise ValueError(f"read_context: expected a method with a cache, got {method!r}; v1 gives the same answers.")
    model.network(torch.tensor([context_ids], device=model.device), past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def ask(model: Model, cache: KVCache, question_ids: list[int], max_new_tokens: int) -> str:
    """The answer: likeliest tokens, no penalties, up to the end of text or `max_new_tokens`; use where the cache was filled.

    A fork of the cache reads the question, so the cache itself is as before. Raises ValueError if context, question and
    answer are together longer than the model allows.
    """
    model.check_context(cache.get_seq_length() + len(question_ids) + max_new_tokens)
    ends = model.network.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    fork, answer = cache.fork(), []
    new = torch.tensor([question_ids], device=model.device)
    while len(answer) < max_new_tokens:
        new = model.network(new, past_key_values=fork, logits_to_keep=1).logits[:, -1:].argmax(-1)
        if new.item() in ends:
            break
        answer.append(new.item())
    fork.reset()
    return model.tokenizer.decode(answer, skip_special_tokens=True)
