"""Which text the bundled models read in training, and which text is kept from them.

Training reads what every environment has: Python's standard library and the installed packages; and
WikiText-2 where `$KVLIB_WIKITEXT` (or `data/wikitext-2`) names a folder that holds it.
"""

import functools
import lzma
import os
import random
import sysconfig
from importlib import metadata
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvlib import paths

HELD_OUT = (
    "difflib",
    "imaplib",
    "mailbox",
    "plistlib",
    "shlex",
    "statistics",
    "textwrap",
    "trace",
    "webbrowser",
    "zipapp",
)
CALIBRATION = (
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "csv",
    "ftplib",
    "ipaddress",
    "pickle",
    "subprocess",
    "tarfile",
    "zipfile",
)
SELECTION = ("inspect", "optparse", "typing")
END_OF_TEXT = "<|endoftext|>"
BYTES_PER_PACKAGE = 3_000_000
SKIPPED_PARTS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "_vendor",
}


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not SKIPPED_PARTS & set(p.relative_to(root).parts))


def held_out_text() -> str:
    """Evaluation text: ten standard-library modules that no bundled model was trained on."""
    return _modules(HELD_OUT)


def calibration_text() -> str:
    """What maps are fitted on: other modules, which the bundled models have read."""
    return _modules(CALIBRATION)


def selection_text() -> str:
    """What layer maps are chosen on: other modules again."""
    return _modules(SELECTION)


def _modules(names: tuple[str, ...]) -> str:
    root = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((root / f"{name}.py").read_text(encoding="utf-8") for name in names)


def xz_bits_per_byte(text: str) -> float:
    """What `xz -9e` needs for this text: the yardstick for a language model's bits per byte."""
    raw = text.encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


@functools.cache
def _held_out_lines() -> frozenset[str]:
    return frozenset(line.strip() for line in held_out_text().splitlines() if len(line.strip()) >= 30)


def is_contaminated(text: str, limit: float = 0.05) -> bool:
    """True if over `limit` of the long lines also stand in the held-out text (a vendored or older copy of it)."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]
    return bool(lines) and sum(line in _held_out_lines() for line in lines) > limit * len(lines)


def _read(files: list[Path], budget: int | None = None) -> list[str]:
    texts, size = [], 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text and not is_contaminated(text):
            texts.append(text)
            size += len(text)
        if budget and size > budget:
            break
    return texts


def _packages(seed: int) -> list[str]:
    texts = []
    for dist in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        files = sorted(
            str(f.locate()) for f in dist.files or () if f.suffix == ".py" and not SKIPPED_PARTS & set(f.parts[:-1])
        )
        random.Random(seed).shuffle(files)
        texts += _read([Path(f) for f in files if os.path.exists(f)], BYTES_PER_PACKAGE)
    return texts


def wikitext(split: str) -> str | None:
    """One split of WikiText-2 ("train", "valid" or "test") from a local folder, or None if there is none."""
    folder = Path(os.environ.get("KVLIB_WIKITEXT", paths.ROOT / "data" / "wikitext-2"))
    for name in (f"wiki.{split}.raw", f"wiki.{split}.tokens"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    return None


def standard_library_texts() -> list[str]:
    """The standard library, a text a module, without what is held out."""
    return _read([p for p in _standard_library() if p.stem not in HELD_OUT])


def training_texts(seed: int = 0) -> dict[str, list[str]]:
    """Documents by source: "stdlib", "packages", and "wikitext" where it is at hand."""
    sources = {"stdlib": standard_library_texts(), "packages": _packages(seed)}
    if prose := wikitext("train"):
        sources["wikitext"] = prose.split("\n \n = ")
    return sources


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text round-trips, digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
