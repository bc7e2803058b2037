"""What a run is doing, as its folder shows from outside."""

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
    """The phases of one try of a run, whose folder may hold what earlier tries have left. linear: of `job.linear`."""

    def __init__(self, folder: Path, linear: bool):
        self.folder, self.linear = folder, linear
        self.evaluation = "validation" if linear else "k-NN"
        self.earlier = sum(record["kind"] == "start" for record in all_records(folder))
        self.left = self.half_written()

    def half_written(self) -> set:
        """The files that have no name of their own yet: name, and time of the last change."""
        found = set()
        for path in self.folder.glob("*.pth.tar.new"):
            try:
                found.add((path.name, path.lstat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return found

    def now(self) -> str:
        """The phase in which the run is, or was killed."""
        if self.half_written() - self.left:
            return "checkpoint write"
        found = all_records(self.folder)
        starts = [place for place, record in enumerate(found) if record["kind"] == "start"]
        if len(starts) <= self.earlier:
            return "start-up"
        if any(self.folder.glob("*.left")):  # the first save removes them
            return GOING_BACK
        start, *since = found[starts[-1] :]
        return next(
            filter(None, (self.after(record, start) for record in reversed(since))), ""
        ) or self.first(start)

    def after(self, record: dict, start: dict) -> str:
        """The phase that begins with a record, and goes on until the next; nothing if the record begins none."""
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
        """What comes first after the start-up: an epoch's beginning, steps within it, or its validation."""
        if self.linear and start["step"] == start["steps_an_epoch"]:
            return "validation"
        if start["step"] or self.linear:
            return "steps"
        return "k-NN" if start["epoch"] else "refresh"
