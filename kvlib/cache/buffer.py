"""A tensor that grows along its tokens without copying the past at every step."""

import copy

from torch import Tensor

SLACK_TOKENS = 128
GROWTH = 1.25


class TokenBuffer:
    """[B, H_kv, n, C], appended along n.

    With `capacity_tokens` the room is taken once; beyond it, or without it, room grows by a quarter, so n appends copy
    O(n) tokens in all (torch.cat copies O(n^2)).
    """

    def __init__(self, capacity_tokens: int = 0):
        self.capacity_tokens = capacity_tokens
        self.length = 0
        self.room: Tensor | None = None

    def append(self, new: Tensor) -> None:
        """Add new [B, H_kv, t, C] behind what is there."""
        end = self.length + new.shape[2]
        if self.room is None or end > self.room.shape[2]:
            self._grow(end, new)
        self.room[:, :, self.length : end] = new
        self.length = end

    def _grow(self, needed: int, like: Tensor) -> None:
        capacity = self.capacity_tokens
        if needed > capacity:
            grown = int(GROWTH * self.room.shape[2]) if self.room is not None else 0
            capacity = -(-max(needed, grown) // SLACK_TOKENS) * SLACK_TOKENS
        batch, heads, _, channels = like.shape
        room = like.new_empty(batch, heads, capacity, channels)
        if self.length:
            room[:, :, : self.length] = self.read()
        self.room = room

    def read(self) -> Tensor:
        """A view of everything appended, [B, H_kv, n, C]."""
        return self.room[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; rows may repeat."""
        if self.room is not None:
            self.room = self.room.index_select(0, rows.to(self.room.device))

    def reset(self) -> None:
        """Forget everything and give the room back."""
        self.length, self.room = 0, None


class BufferedStore:
    """What stores that consist of token buffers, `self.buffers`, have in common."""

    buffers: list[TokenBuffer]
    halves: dict[str, tuple[str, ...]]  # names of the buffers that hold "keys", and "values"
    borrowed: tuple[str, ...] = ()

    def lend(self, half: str) -> "BufferedStore":
        """A store for another layer, which reads this one's "keys", or "values", and keeps the other half itself."""
        reader = type(self)(self.buffers[0].capacity_tokens)
        reader.borrowed = self.halves[half]
        for name in reader.borrowed:
            reader.buffers.remove(getattr(reader, name))
            setattr(reader, name, getattr(self, name))
        return reader

    def add(self, name: str, new: Tensor) -> None:
        """Append new [B, H_kv, t, C] to a buffer, unless another layer has done so."""
        if name not in self.borrowed:
            getattr(self, name).append(new)

    @property
    def batch(self) -> int | None:
        """Sequences stored, None before the first."""
        room = self.buffers[0].room
        return None if room is None else len(room)

    def fork(self, forked: dict[int, object]) -> "BufferedStore":
        """A copy, keys and values included; `forked` has what was copied, by id."""
        return copy.deepcopy(self, forked)

    def forget(self, n_tokens: int) -> None:
        """Drop the newest tokens of every sequence."""
        for buffer in self.buffers:
            buffer.crop(max(buffer.length - n_tokens, 0))

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; rows may repeat."""
        for buffer in self.buffers:
            buffer.select(rows)

    def reset(self) -> None:
        """Forget everything and give the room back."""
        for buffer in self.buffers:
            buffer.reset()
