"""The phase of a run, derived from the files of its folder."""

from pathlib import Path

from runs import all_records

GOING_BACK = "going back"  # from the decision of --resume PATH to the first save
PHASES = (
    "start-up",
    GOING_BACK,
    "steps",
    "refresh",
    "k-NN",
    "validation",
    "checkpoint write",
    "end",
)


class Phases:
    """The phases of one try of a run. Its folder may have files of earlier tries.

    linear: the program is `job.linear`.
    """

    def __init__(self, folder: Path, linear: bool):
        self.folder, self.linear = folder, linear
        self.evaluation = "validation" if linear else "k-NN"
        self.earlier = sum(record["kind"] == "start" for record in all_records(folder))
        self.left = self.half_written()

    def half_written(self) -> set:
        """Return the checkpoints with a temporary name: name, and time of the last change."""
        files = set()
        for path in self.folder.glob("*.pth.tar.new"):
            try:
                files.add((path.name, path.lstat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return files

    def now(self) -> str:
        """Return the phase in which the run is, or was killed."""
        if self.half_written() - self.left:
            return "checkpoint write"
        records = all_records(self.folder)
        starts = [index for index, record in enumerate(records) if record["kind"] == "start"]
        if len(starts) <= self.earlier:
            return "start-up"
        if any(self.folder.glob("*.left")):  # the first save removes them
            return GOING_BACK
        start, *since = records[starts[-1] :]
        phases = (self.after(record, start) for record in reversed(since))
        return next(filter(None, phases), "") or self.first(start)

    def after(self, record: dict, start: dict) -> str:
        """Return the phase that starts with a record; "" if none does."""
        match record["kind"]:
            case "step":
                return self.evaluation if record["step"] + 1 == start["steps_an_epoch"] else "steps"
            case "knn":
                return "refresh"
            case "refresh":
                return "steps" if record["stage"] == 4 else "refresh"
            case "validation":
                return "steps"
            case "end":
                return "end"
        return ""

    def first(self, start: dict) -> str:
        """Return the first phase after the start-up. It depends on the position of the start."""
        if self.linear and start["step"] == start["steps_an_epoch"]:
            return "validation"
        if start["step"] or self.linear:
            return "steps"
        return "k-NN" if start["epoch"] else "refresh"
