"""How columns, numbers and methods are shown, whatever draws them: units, three digits, one colour and marker each."""

import zlib
from collections.abc import Iterable
from numbers import Real

import numpy as np

UPPER = ("tpot", "ttft", "kv", "qkv", "kl", "mlp", "lm", "gpu", "cpu", "cka")
WORDS = {**{word: word.upper() for word in UPPER}, "top1": "top-1", "flops": "FLOPs", "n": "number of"}
UNITS = {  # how a column name ends: the unit shown, and how many of the column's units make one
    "bytes_per_s": ("GB/s", 1e9),
    "flops_per_s": ("GFLOP/s", 1e9),
    "flops_per_byte": ("FLOP/byte", 1),
    "bytes_per_token": ("KiB/token", 2**10),
    "ms_per_token": ("ms/token", 1),
    "tokens_per_s": ("tokens/s", 1),
    "requests_per_s": ("requests/s", 1),
    "bytes": ("MiB", 2**20),
    "tokens": ("tokens", 1),
    "percent": ("%", 1),
    "nats": ("nats", 1),
    "bits": ("bits", 1),
    "ms": ("ms", 1),
    "us": ("µs", 1),
    "s": ("s", 1),
    "x": ("×", 1),
}
LOOKS = {  # colour and marker; the methods of one notebook stay apart under the three colour-blindnesses
    "v0": ("#7a7a7a", "X"),
    "v1": ("#0072b2", "o"),
    "v2": ("#c44601", "s"),
    "v2-bnb": ("#7a3b12", "p"),
    "v2-fused": ("#f2ae1c", "D"),
    "v3": ("#1a9850", "^"),
    "v3a": ("#93d6b4", "v"),
    "v4": ("#6a1b5d", "P"),
    "v4a": ("#d493cf", "p"),
    "streaming": ("#56b4e9", "<"),
    "h2o": ("#0b5d2e", "^"),
    "snapkv": ("#f2c100", "D"),
    "tova": ("#8a2358", "v"),
    "scissorhands": ("#8f6b1e", "P"),
    "keydiff": ("#e6007e", "o"),
    "random": ("#aaaaaa", "X"),
    "kivi-4": ("#3b1a8a", "s"),
    "kivi-2": ("#9c86f5", "p"),
    "hybrid-5x": ("#f2a48c", ">"),
    "hybrid-8x": ("#dd5a3c", "h"),
    "hybrid-12x": ("#7f1010", "*"),
    "plain": ("#c44601", "o"),
    "aligned": ("#0072b2", "s"),
}
OTHER_COLOURS = "#0173b2 #de8f05 #029e73 #d55e00 #cc78bc #ca9161 #fbafe4 #949494 #ece133 #56b4e9".split()
OTHER_LOOKS = list(zip(OTHER_COLOURS, "osD^vPXp<>", strict=True))


def shown(column: str) -> tuple[str, float]:
    """Label and divisor of a column: "held_bytes" -> ("Held (MiB)", 1048576)."""
    for ending, (unit, divisor) in UNITS.items():
        if column == ending:
            return unit, divisor
        if column.endswith(f"_{ending}"):
            return f"{in_words(column.removesuffix(f'_{ending}'))} ({unit})", divisor
    return in_words(column), 1


def in_words(name: str) -> str:
    """The words of a column name: "max_batch" -> "Max batch"."""
    text = " ".join(WORDS.get(word, word) for word in str(name).split("_"))
    return text[:1].upper() + text[1:]


def numbers(values: Iterable) -> list[str]:
    """One column's values in three digits, in full where all are whole; text as it is, a missing one as a dash."""
    values = list(values)
    whole = all(float(value).is_integer() for value in values if _is_number(value))
    return [_three_digits(v, whole) if _is_number(v) else "–" if v is None or v != v else str(v) for v in values]


def short(value) -> str:
    """One value as `numbers` shows a column."""
    return numbers([value])[0]


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) and bool(np.isfinite(value))


def _three_digits(value: float, whole: bool) -> str:
    return f"{round(value):,}" if whole or abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def ordered(names: Iterable) -> list:
    """Each name once: numbers by size, methods as in LOOKS, then others as they come."""
    names, known = list(dict.fromkeys(names)), list(LOOKS)
    if not any(isinstance(name, str) for name in names):
        return sorted(names)
    return sorted(names, key=lambda name: known.index(name) if name in LOOKS else len(known))


def looks(names: Iterable) -> dict:
    """-> {name: (colour, marker)}, in order: a method's own, whatever words follow it; another name's follows from the name
    and is free here."""
    chosen = {}
    for name in ordered(names):
        first = zlib.crc32(str(name).encode()) % len(OTHER_LOOKS)
        turned = OTHER_LOOKS[first:] + OTHER_LOOKS[:first]
        own = LOOKS.get(name) or LOOKS.get(str(name).split(" ")[0])
        chosen[name] = own or next((look for look in turned if look not in chosen.values()), turned[0])
    return chosen
