"""What a run is doing, as its folder shows from outside."""

import re
from pathlib import Path

GOING_BACK = "going back"  # from the decision of --resume PATH to the first save
PHASES = ("start-up", GOING_BACK, "steps", "refresh", "k-NN", "validation", "checkpoint write", "end")

# What has begun with a line of log.txt, and goes on until the next line that is found here.
BEGINS = [
    (r"after (\d+) epochs: k-NN accuracy", "refresh"),
    (r"measuring: |refresh before epoch|  layer[123]: ", "refresh"),
    (r"epoch \d+ mean: |k-NN, .* batches$|validating: .* batches$", "evaluation"),  # k-NN, or validation
    (r"  layer4: |epoch \d+ step \d|epoch \d+ validation on", "steps"),
    (r"done: ", "end"),
]


class Phases:
    """The phases of one try of a run, whose folder may hold what earlier tries have left. linear: of `job.linear`."""

    def __init__(self, folder: Path, linear: bool):
        self.folder, self.linear, self.log = folder, linear, folder / "log.txt"
        self.evaluation = "validation" if linear else "k-NN"
        self.begun = self.log.stat().st_size if self.log.exists() else 0
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
        if not self.log.exists():
            return "start-up"
        with open(self.log) as file:
            file.seek(self.begun)
            said = file.read()
        if "going back: " in said and any(self.folder.glob("*.left")):  # the first save removes them
            return GOING_BACK
        if "images a worker and step" not in said:
            return "start-up"
        for line in reversed(said.splitlines()):
            for pattern, phase in BEGINS:
                if re.search(pattern, line):
                    return self.evaluation if phase == "evaluation" else phase
        return self.first(said)

    def first(self, said: str) -> str:
        """What comes first after the start-up: an epoch's beginning, steps within it, or its validation."""
        resumed = re.search(r"resuming from \S*checkpoint_(\d+)_(\d+)", said)
        epoch, step = map(int, resumed.groups()) if resumed else (0, 0)
        if self.linear and f", {step} steps an epoch" in said:
            return "validation"
        if step or self.linear:
            return "steps"
        return "k-NN" if epoch else "refresh"
