"""What an unfinished run has done, in a file beside the results of its profile: the next run of the same plan resumes it."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from kvlib.execute import say
from kvlib.matrix import Task
from kvlib.paths import results_dir, write_aside
from kvlib.plan import Parameters


@dataclass
class Journal:
    """When the run began, in UTC: older rows do not count for it. `finished` are the tasks of `plan` that are done."""

    started: str
    plan: dict[str, Parameters]
    finished: list[str]
    file: Path

    def note(self, task: str) -> None:
        """On disk: this task is done."""
        self.finished.append(task)
        self.write()

    def write(self) -> None:
        """Put everything on disk."""
        fields = asdict(self)
        del fields["file"]
        write_aside(self.file, json.dumps(fields, indent=1) + "\n")

    def close(self) -> None:
        """Nothing is left to resume."""
        self.file.unlink(missing_ok=True)


def open_journal(file: Path, plan: dict[str, Parameters], fresh: bool) -> Journal:
    """The journal of a run that begins now, or of the unfinished one of the same plan, unless `fresh`."""
    if file.exists() and not fresh:
        unfinished = Journal(**{"finished": []} | json.loads(file.read_text()), file=file)
        if unfinished.plan == plan:
            done = f"{len(unfinished.finished)} of {len(plan)} notebooks are done"
            say(f"resuming the run of {unfinished.started}: {done}, what it measured stands (--fresh starts over)")
            return unfinished
        say(f"starting anew: the unfinished run of {unfinished.started} had other arguments")
    journal = Journal(datetime.now(UTC).isoformat(timespec="seconds"), plan, [], file)
    journal.write()
    return journal


def open_journals(tasks: list[Task], fresh: bool) -> dict[str, Journal]:
    """{profile: its journal} of a run of these tasks."""
    todo = {}
    for task in tasks:
        todo.setdefault(task.profile, {})[task.stem] = task.parameters
    return {name: open_journal(results_dir(name) / ".run.json", plan, fresh) for name, plan in todo.items()}
