"""What a run does: which notebooks, with which parameters. Everything is checked before anything starts."""

import ast
import json
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from kvlib import paths

Parameters = dict[str, object]
OWN_OPTIONS = ("profile", "rows")  # parameters of every notebook that only --profile and --rows set


@dataclass(frozen=True)
class Profile:
    """One file of notebooks/profiles: which notebooks it runs, parameters for all of them, and for single ones."""

    name: str
    description: str
    notebooks: list[str]
    shared: Parameters
    sections: dict[str, Parameters]


def notebooks() -> dict[str, Path]:
    """{"01_baseline": its path, ...} in order. Raises ValueError where there are none."""
    found = {path.stem: path for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise ValueError(f"no notebooks NN_name.ipynb in {paths.NOTEBOOKS}; run from a checkout of the repository.")
    return found


def code_cells(path: Path) -> list[tuple[str, bool]]:
    """The source of every code cell, and whether it is the one tagged parameters."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), "parameters" in cell["metadata"].get("tags", [])) for cell in cells]


def read_defaults() -> dict[str, Parameters]:
    """{notebook: {parameter: default}} from the cells tagged parameters; raises ValueError unless all are literals."""
    defaults = {name: {} for name in notebooks()}
    for name, path in notebooks().items():
        tagged = "\n".join(source for source, is_tagged in code_cells(path) if is_tagged)
        for line in ast.parse(tagged).body:
            key = ast.unparse(line.target if isinstance(line, ast.AnnAssign) else line.targets[0])
            try:
                defaults[name][key] = ast.literal_eval(line.value)
            except ValueError as error:
                raise ValueError(f"{name}: expected a literal for {key}, got {ast.unparse(line.value)}.") from error
        if missing := {"profile", "rows", "device"} - defaults[name].keys():
            raise ValueError(f"{name}: the cell tagged parameters lacks {', '.join(sorted(missing))}.")
    return defaults


def title_and_question(path: Path) -> tuple[str, str]:
    """What a notebook is called, and the question that its opening text asks."""
    import nbformat  # a second to import, and only --list needs it

    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    paragraphs = [" ".join(text.split()) for cell in cells for text in cell.split("\n\n")]
    title = next((text for text in paragraphs if text.startswith("# ")), "")
    question = next((text for text in paragraphs if text.startswith("**Question.**")), "")
    return title.removeprefix("# "), question.removeprefix("**Question.** ")


def profile_names() -> list[str]:
    """Names that --profile takes."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def find(word: object, names: Iterable[str], where: str) -> str:
    """The notebook among `names` that "01", "1" or "01_baseline" means; raises ValueError where none does."""
    stem = Path(str(word)).stem
    for name in names:
        if stem == name or (stem.isdecimal() and int(stem) == int(name[:2])):
            return name
    raise ValueError(f"{where}: no notebook {word!r}; expected one of {', '.join(names)}.")


def parse_yaml(text: str, where: str) -> object:
    """The YAML value in `text`; raises ValueError, in one sentence, where it is malformed."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: malformed YAML, {' '.join(str(error).split())}.") from error


def read_profile(name: str, names: Iterable[str]) -> Profile:
    """The profile `name`, for the notebooks `names`. Raises ValueError for an unknown one and for a malformed file."""
    if name not in profile_names():
        raise ValueError(f"unknown profile {name!r}; expected one of {', '.join(profile_names())}.")
    where = f"{name}.yaml"
    content = parse_yaml((paths.PROFILES / where).read_text(), where) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping, got {content!r}.")

    description, listed = content.pop("description", ""), content.pop("notebooks", list(names))
    if not isinstance(listed, list):
        raise ValueError(f'{where}: notebooks: expected a list like ["01", "02"], got {listed!r}.')
    for key, section in content.items():
        if not isinstance(section, dict):
            raise ValueError(f"{where}: {key}: expected a mapping of parameters, got {section!r}.")
    return Profile(
        name=name,
        description=" ".join(str(description).split()),
        notebooks=sorted(find(word, names, f"{where}: notebooks") for word in listed),
        shared=content.pop("all", {}),
        sections={find(key, names, where): section for key, section in content.items()},
    )


def split_assignment(assignment: str, option: str) -> tuple[str, str]:
    """The name and the text of a word "name=text" of an option; raises ValueError for another form."""
    name, equals, text = assignment.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{option}: expected name=value, got {assignment!r}; name notebooks before the options.")
    return name, text


def parse_settings(assignments: list[str]) -> Parameters:
    """{name: value} of words "name=value", the values YAML scalars or lists; raises ValueError for another form."""
    named = (split_assignment(assignment, "--set") for assignment in assignments)
    return {name: parse_yaml(text, f"--set {name}") for name, text in named}


def fitted(value: object, default: object, where: str) -> object:
    """`value` in the type of `default`, element by element in a list; raises ValueError where it is of another type.

    A float takes whole numbers and 1e-3, which YAML reads as text; a default of None takes anything.
    """
    if isinstance(default, list) and isinstance(value, list) and default:
        example = next((element for element in default if isinstance(element, float)), default[0])
        return [fitted(element, example, where) for element in value]
    if isinstance(default, float) and not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            return float(value)
    if default is None or type(value) is type(default):
        return value
    raise ValueError(f"{where}: expected {type(default).__name__}, as in {default!r}, got {value!r}.")


def takers(key: str, names: Iterable[str], defaults: dict[str, Parameters], where: str) -> list[str]:
    """The notebooks among `names` that have the parameter `key`; raises ValueError where none may be given it."""
    if key in OWN_OPTIONS:
        raise ValueError(f"{where}: {key} is no free parameter; use --{key}.")
    if found := [name for name in names if key in defaults[name]]:
        return found
    allowed = sorted(set().union(*(defaults[name] for name in names)) - set(OWN_OPTIONS))
    raise ValueError(f"{where}: unknown parameter {key!r}; expected one of {', '.join(allowed)}.")


def make(
    defaults: dict[str, Parameters], words: list[str], profile: Profile, settings: Parameters, rows: str
) -> dict[str, Parameters]:
    """{notebook: parameters to inject}, for the notebooks that `words` name or else all of the profile's.

    `defaults` are the notebooks' own parameters. Over them go the profile's "all", its section for the notebook, and
    `settings`, each to the notebooks that have the parameter. Raises ValueError for an unknown notebook or parameter
    and a value of another type.
    """
    chosen = sorted({find(word, profile.notebooks, f"profile {profile.name}") for word in words}) or profile.notebooks
    planned = {name: {"profile": profile.name, "rows": rows} for name in defaults}
    scopes = [
        (f"{profile.name}.yaml, all", list(defaults), profile.shared),
        *((f"{profile.name}.yaml, {name}", [name], section) for name, section in profile.sections.items()),
        ("--set", chosen, settings),
    ]
    for where, names, given in scopes:
        for key, value in given.items():
            for name in takers(key, names, defaults, where):
                planned[name][key] = fitted(value, defaults[name][key], f"{where}: {key}")
    return {name: planned[name] for name in chosen}


def check_device(device: str) -> None:
    """Raises ValueError for a device that does not exist or is not here; torch is loaded only to look for a GPU."""
    if device not in ("auto", "cpu"):
        from kvlib.model.load import pick_device

        pick_device(device)


def check_writable(*folders: Path) -> None:
    """Makes the folders; raises ValueError where one cannot be written."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"cannot write to {folder} ({error.strerror}); choose a folder with --output.") from error
