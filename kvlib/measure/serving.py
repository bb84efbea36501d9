"""Continuous batching (Orca, Yu et al. 2022) under a byte budget, with any method: a measuring instrument, no web server.

Every turn of the loop admits what fits, reads one chunk of one prompt, and makes one token for each sequence. Prompts are
read in the same chunks whatever happens, and what the engine computes for a sequence does not depend on the others:
whatever is batched, preempted, swapped or shared, the tokens are those of the request served alone.

Time is the server's own clock: the measured seconds of its turns, and arrivals as traffic has them; nobody waits idle.
"""

import time
from collections import OrderedDict

import torch

from kvlib.cache.adapter import KVCache
from kvlib.cache.attention import attention_through_cache
from kvlib.cache.pages import PoolExhausted
from kvlib.cache.swap import SwappedCache
from kvlib.measure.engine import Engine
from kvlib.measure.job import Job
from kvlib.measure.requests import Answer, Request, RequestLog
from kvlib.model.load import Model

PREEMPTION = ("swap", "recompute")


class Server:
    """Where the pool of an engine is full, its newest job makes room, by `preempt`: its pages are swapped to host memory, or
    it starts over and repeats its steps, one by one, because a compressed cache that reads them in one go would not be the
    same. Caches in one piece have all their room from the beginning (the oracle of Kwon et al. 2023) and are never
    preempted. `share_prefixes` keeps forks of caches at the ends of chunks, and begins a prompt from the longest that
    fits. `max_rows` limits sequences at once, `max_waiting` the queue: who finds it full is refused. Raises ValueError for
    options that do not fit.
    """

    def __init__(
        self, engine: Engine, *, max_rows: int = 64, max_waiting: int | None = None, chunk_tokens: int = 256,
        preempt: str = "swap", share_prefixes: bool = False, log: RequestLog | None = None,
    ):  # fmt: skip
        if preempt not in PREEMPTION:
            raise ValueError(f"preempt: expected one of {', '.join(PREEMPTION)}, got {preempt!r}.")
        if share_prefixes and not engine.pool:
            raise ValueError(f"share_prefixes: {engine.method} has no pages to share; use a paged method.")
        if chunk_tokens < 1 or max_rows < 1:
            raise ValueError(f"server: expected chunk_tokens and max_rows of 1 or more, got {chunk_tokens} and {max_rows}.")
        self.engine, self.max_rows, self.max_waiting, self.log = engine, max_rows, max_waiting, log
        self.chunk_tokens, self.preempt, self.share_prefixes = chunk_tokens, preempt, share_prefixes
        self.coming, self.waiting = [], []  # jobs, by arrival
        self.reading: Job | None = None
        self.running: list[Job] = []  # in the order of their rows in the batch
        self.prefixes: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()
        self.answers: list[Answer] = []
        self.clock_s = self.busy_s = self.mark_s = 0.0
        self.timeline: list[dict[str, float]] = []

    # Jobs come and go

    def submit(self, requests: list[Request]) -> None:
        """Take requests; those that can never be served are answered at once, with the reason. Their names must differ."""
        if len({request.name for request in requests}) < len(requests):
            raise ValueError("server: expected requests of different names.")
        self.mark_s = time.perf_counter()
        for request in requests:
            if self.log and request.name not in self.log.requests:
                self.log.write(request)
            reason = request.why_impossible(self.engine.model.context_limit, self.max_rows)
            reason = reason or self.engine.why_too_large(request)
            if reason:
                self._answer(Job(request), reason)
            else:
                self.coming.append(Job(request))
        self.coming.sort(key=lambda job: job.request.arrival_s)

    def _answer(self, job: Job, refused: str = "") -> None:
        self._tick()
        times = (job.request.arrival_s, job.first_token_s, self.clock_s)
        reason = refused and f"{job.request.name}: {refused}"
        tokens = () if refused else job.sequences()
        answer = Answer(job.request.name, tokens, reason, *times, job.n_preempted, job.shared_tokens)
        if self.log:
            self.log.write(answer)
        self.answers.append(answer)
        if not self.engine.pool and not refused:
            self.engine.reserved_bytes -= self.engine.bytes_to_begin(job.request)

    def _jobs(self) -> list[Job]:
        """Those that hold room."""
        return [*self.running, *([self.reading] if self.reading else [])]

    def _admit(self) -> None:
        """Let the first in the queue begin, or come back, if there is room for it and for one more page of everyone else."""
        n_running = sum(job.n_rows for job in self.running)
        if self.reading or not self.waiting or n_running + self.waiting[0].n_rows > self.max_rows:
            return
        job, engine = self.waiting[0], self.engine
        swapped = isinstance(job.cache, SwappedCache)
        need = job.cache.held_bytes if swapped else engine.bytes_to_begin(job.request)
        least_free = need + n_running * engine.cache_bytes(1) * (engine.pool is not None)
        while engine.used_bytes + least_free > engine.budget_bytes and self.prefixes:
            self._forget_prefix()
        if engine.used_bytes + least_free > engine.budget_bytes and self.running:
            return
        self.waiting.pop(0)
        if swapped:
            return self._run(job, [job.cache.restore()])
        engine.reserved_bytes += 0 if engine.pool else need
        job.n_read, job.cache = self._begin(job.request)
        job.shared_tokens, self.reading = job.n_read, job

    def _begin(self, request: Request) -> tuple[int, KVCache]:
        """How many tokens of a prompt are in a kept prefix, and a cache with these."""
        for n in range((len(request.prompt) - 1) // self.chunk_tokens * self.chunk_tokens, 0, -self.chunk_tokens):
            if request.prompt[:n] in self.prefixes:
                self.prefixes.move_to_end(request.prompt[:n])
                return n, self.prefixes[request.prompt[:n]].fork()
        return 0, self.engine.fresh_cache(request.total_tokens)

    def _forget_prefix(self) -> None:
        self.prefixes.popitem(last=False)[1].reset()

    def _run(self, job: Job, caches: list[KVCache]) -> None:
        """Put a job's sequences into the batch."""
        job.cache = None
        for cache in caches:
            self.engine.batch.join(cache)
        self.running.append(job)

    def _rows(self, job: Job) -> list[int]:
        first = sum(other.n_rows for other in self.running[: self.running.index(job)])
        return list(range(first, first + job.n_rows))

    def _make_room(self) -> None:
        """Free some pages: of a kept prefix, else of the newest job, which then waits, or is refused if it is the only one."""
        if self.prefixes:
            return self._forget_prefix()
        jobs = self._jobs()
        job = max(jobs, key=lambda job: job.request.arrival_s)
        if job is self.reading:
            job.cache.reset()
            job.start_over()
            self.reading = None
        else:
            taken = self.engine.batch.take(self._rows(job))
            self.running.remove(job)
            if self.preempt == "swap" and len(jobs) > 1:
                job.cache = SwappedCache(taken)
            else:
                taken.reset()
                job.start_over()
        job.n_preempted += 1
        if len(jobs) > 1:
            self.waiting.insert(0, job)
        else:
            self._answer(job, f"its pages do not fit in the budget of {self.engine.budget_bytes:,} bytes")

    # A turn

    def run(self) -> list[Answer]:
        """Serve all that was submitted."""
        while self.coming or self.waiting or self._jobs():
            self.turn()
        return self.answers

    @torch.inference_mode()
    def turn(self) -> None:
        """One turn of the loop; where there is nothing to do, the clock goes on to the next arrival."""
        if not (self.waiting or self._jobs()):
            self.clock_s = max(self.clock_s, self.coming[0].request.arrival_s)
        self.mark_s = time.perf_counter()
        while self.coming and self.coming[0].request.arrival_s <= self.clock_s:
            job = self.coming.pop(0)
            if self.max_waiting is not None and len(self.waiting) >= self.max_waiting:
                self._answer(job, f"{self.max_waiting} others are waiting already")
            else:
                self.waiting.append(job)
        self._admit()
        if self.reading:
            self._read_chunk(self.reading)
        self._decode()
        self._tick()
        self.timeline.append(self._state())

    def _state(self) -> dict[str, float]:
        """The moment's sequences, tokens made so far, and bytes: taken from the system, used, and of these empty of tokens."""
        n_tokens = sum(len(tokens) for answer in self.answers for tokens in answer.tokens)
        n_tokens += sum(len(job.steps) * job.n_rows for job in (*self._jobs(), *self.waiting))
        n_running = sum(job.n_rows for job in self.running)
        row = {"clock_s": self.clock_s, "n_running": n_running, "n_waiting": len(self.waiting), "n_tokens": n_tokens}
        return row | self.engine.bytes_now([(job.n_seen, job.n_rows) for job in self._jobs()])

    def _tick(self) -> None:
        """Bring the clock up to now."""
        now = time.perf_counter()
        self.clock_s, self.busy_s, self.mark_s = self.clock_s + now - self.mark_s, self.busy_s + now - self.mark_s, now

    def _read_chunk(self, job: Job) -> None:
        """Read on in a prompt; at its end, its first tokens are chosen, and its sequences join the batch."""
        prompt, n = job.request.prompt, min(job.n_read + self.chunk_tokens, len(job.request.prompt))
        try:
            logits, likeliest = self.engine.read(prompt[job.n_read : n], job.n_read, job.cache)
        except PoolExhausted:
            return self._make_room()
        job.n_read = n
        if self.share_prefixes and n % self.chunk_tokens == 0 and prompt[:n] not in self.prefixes:
            self.prefixes[prompt[:n]] = job.cache.fork()
        if n == len(prompt):
            job.choose(logits, likeliest)
            self._tick()
            job.first_token_s, self.reading = job.first_token_s or self.clock_s, None
            self._run(job, [job.cache, *(job.cache.fork() for _ in range(job.n_rows - 1))])
            self._finish()

    def _decode(self) -> None:
        """One more token for every sequence in the batch."""
        logits = None
        while self.running and logits is None:
            tokens = [token for job in self.running for token in job.steps[job.n_done - 1][1]]
            positions = [job.n_seen for job in self.running for _ in range(job.n_rows)]
            try:
                logits, likeliest = self.engine.step(tokens, positions)
            except PoolExhausted:
                self._make_room()
        if not self.running:
            return
        order, first = [], 0
        for job in self.running:
            parents, _ = job.choose(logits[first : first + job.n_rows], likeliest[first : first + job.n_rows])
            order += [first + parent for parent in parents]
            first += job.n_rows
        if order != list(range(first)):
            self.engine.batch.batch_select_indices(torch.tensor(order))
        self._finish()

    def _finish(self) -> None:
        """Answer the jobs that have all their tokens."""
        for job in [job for job in self.running if job.is_done]:
            self.engine.batch.drop(self._rows(job))
            self.running.remove(job)
            self._answer(job)


def serve(model: Model, method: str, requests: list[Request], budget_bytes: int, **options) -> Server:
    """Serve requests to the end; `options` are those of `Server`. What its log has answered already is left alone."""
    server = Server(Engine(model, method, budget_bytes), **options)
    if log := server.log:
        requests = [*log.open_requests, *(request for request in requests if request.name not in log.requests)]
    with attention_through_cache(model.network):
        server.submit(requests)
        server.run()
    return server
