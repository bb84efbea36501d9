"""Where things are: bundled models, recorded results, figures, notebooks."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
MODELS = ROOT / "data" / "models"
CACHE = ROOT / "data" / "cache"  # rebuilt at will: token streams, training checkpoints


def output_root() -> Path:
    """The folder that results, figures and executed notebooks go under: the repository, or $KVLIB_OUTPUT."""
    return Path(os.environ.get("KVLIB_OUTPUT", ROOT))


def results_dir(profile: str) -> Path:
    """Recorded rows of one profile."""
    return output_root() / "data" / "results" / profile


def figures_dir(profile: str) -> Path:
    """Figures and tables; those of the default profile keep the paper's bare names.

    Points of a grid draw the same figures: each has a folder of its own, named by $KVLIB_POINT.
    """
    folder = output_root() / "figures"
    return (folder if profile == "laptop" else folder / profile) / os.environ.get("KVLIB_POINT", "")


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or untouched: to a neighbour first, then moved over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)
