"""A request, its answer, and the log from which a server that was killed goes on."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from kvlib.measure.choice import CHOICES


@dataclass(frozen=True)
class Request:
    """`new_tokens` for a prompt of token ids, wanted from `arrival_s` on.

    `how` and `n_sequences`: that many beams, the best one first (one beam is greedy decoding), or that many samples at
    a temperature of 1, drawn with `seed`.
    """

    name: str
    arrival_s: float
    prompt: tuple[int, ...]
    new_tokens: int
    n_sequences: int = 1
    how: str = "beams"
    seed: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and of one answer."""
        return len(self.prompt) + self.new_tokens

    def why_impossible(self, context_limit: int, max_rows: int) -> str | None:
        """What is wrong with it, in words; None: nothing."""
        if not self.prompt:
            return "its prompt is empty"
        if self.new_tokens < 1:
            return f"{self.new_tokens} new tokens are asked for; ask for one or more"
        if self.total_tokens > context_limit:
            return f"its {self.total_tokens} tokens exceed the model's context of {context_limit}"
        if self.how not in CHOICES or not 1 <= self.n_sequences <= max_rows:
            return f"{self.n_sequences} {self.how} are asked for; expected 1 to {max_rows} of {' or '.join(CHOICES)}"
        return None


@dataclass(frozen=True)
class Answer:
    """What became of a request: tokens [n_sequences][new_tokens], none if it was refused, and then why.

    Times are of the server's clock, in s; `n_preempted` counts how often it lost its place, `shared_tokens` are those of
    the prompt that were not read again.
    """

    name: str
    tokens: tuple[tuple[int, ...], ...] = ()
    refused: str = ""
    arrival_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0
    n_preempted: int = 0
    shared_tokens: int = 0

    @property
    def ttft_ms(self) -> float:
        """Time to first token: from the arrival, waiting included."""
        return 1e3 * (self.first_token_s - self.arrival_s)

    @property
    def tpot_ms(self) -> float:
        """Time per output token behind the first."""
        return 1e3 * (self.finished_s - self.first_token_s) / max(len(self.tokens[0]) - 1, 1)


class RequestLog:
    """A file of JSON lines, one for each request taken and one for each answer given, in their order.

    An answer counts as given once its line is on disk. What a kill cut off is the last line; it is removed.
    """

    def __init__(self, path: Path | str):
        self.path, self.requests, self.answers = Path(path), {}, {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        for number, line in enumerate(lines[:-1], 1):
            self._remember(line, number)
        if lines[-1]:
            with self.path.open("r+b") as file:
                file.truncate(self.path.stat().st_size - len(lines[-1]))

    def _remember(self, line: bytes, number: int) -> None:
        try:
            fields = json.loads(line)
            kind = fields.pop("kind")
            if kind == "request":
                self.requests[fields["name"]] = Request(**fields | {"prompt": tuple(fields["prompt"])})
            else:
                self.answers[fields["name"]] = Answer(**fields | {"tokens": tuple(map(tuple, fields["tokens"]))})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path}: line {number} is broken ({error}); delete or repair it.") from None

    @property
    def open_requests(self) -> list[Request]:
        """Those that nobody has answered yet."""
        return [request for name, request in self.requests.items() if name not in self.answers]

    def write(self, thing: Request | Answer) -> None:
        """Put a request or an answer on disk. Raises ValueError for a request that is there, or an answer already given."""
        is_request = isinstance(thing, Request)
        known, kind = (self.requests, "request") if is_request else (self.answers, "answer")
        if thing.name in known:
            raise ValueError(f"{self.path}: there is {'a request' if is_request else 'an answer'} {thing.name!r} already.")
        with self.path.open("ab") as file:
            file.write(json.dumps({"kind": kind} | dataclasses.asdict(thing)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        known[thing.name] = thing
