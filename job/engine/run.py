"""A run: its folder, records and checkpoints, on its workers."""

import dataclasses
import os
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import yaml

from job.checkpoints.folder import LEFT, Checkpoints
from job.cluster.memory import keep_freed_memory, set_apart
from job.cluster.objects import allgather
from job.data.images import Images
from job.declare import declared, differing
from job.engine.workers import Workers
from job.errors import RunError
from job.files import write_whole
from job.metrics import events
from job.metrics.callbacks import Callback, forget_trackers, load
from job.options import Common
from job.position import START, Count, Position, change, resumed
from job.text import printable


class Run(Workers):
    """The workers and their folder. `begin` writes the first file.

    keep: the number of checkpoints to keep. events_every: steps between TensorBoard's values; 0: no
    event files. options: of the program, by name. callbacks: receive the run's records, on rank 0.
    defaults: of the options. The log lists only the other values.
    """

    def __init__(
        self,
        folder: str,
        keep: int,
        events_every: int = 0,
        options: Mapping[str, Any] = MappingProxyType({}),
        callbacks: Sequence[Callback] = (),
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(options)
        self.folder, self.complete = folder, os.path.join(folder, "complete")
        self.events_every, self.callbacks, self.defaults = events_every, callbacks, defaults
        self.checkpoints = Checkpoints(folder, keep)
        self.bad_images: set[str] = set()

    @classmethod
    def of(cls, folder: str, config: Common, callbacks: Sequence[Callback] = ()) -> "Run":
        """Return the run of a program that trains."""
        events_every = config.print_freq if config.tensorboard else 0
        options = dataclasses.asdict(config)
        defaults = {f.name: declared(f) for f in dataclasses.fields(config)}
        return cls(folder, config.keep, events_every, options, callbacks, defaults)

    def saved(self, epoch: int, step: int) -> bool:
        """Return whether the folder has the checkpoint of a position. A collective."""
        return self.on_first(lambda: self.checkpoints.has(epoch, step))

    def begin(
        self,
        options: dict,
        saved: dict | None,
        images: int,
        resume: str,
        losses: Sequence[str] = (),
        labelled: int | None = None,
        unused: Collection[str] = (),
    ) -> None:
        """Start the count of steps, save the options, and open log and records. A collective.

        The order of writes is safe if the power fails between any two. A checkpoint's records are
        on disk before the checkpoint (Log.sync). The next checkpoint has its name before an old one
        is removed. A resume renames later checkpoints (resume_at), then writes the decision to go
        back, then drops later records. `complete` is written last.

        options: by name, with batch_size. saved: the checkpoint that the run resumes from, or None
        for a new run. images: the number of training images. resume: the option. losses: names of
        the framework's losses. labelled: the number of images with a label. unused: names of the
        options without effect, which the log leaves out.
        RunError, on all workers: a new run's folder has checkpoints, the folder cannot be written
        to, or the package that writes event files is not installed.
        """
        start = Position(saved["epoch"], saved["step"]) if saved else START
        steps = images // options["batch_size"]
        own_batch = self.own_batch(options["batch_size"])
        self.count = resumed(saved, steps) if saved else Count(steps)

        def write() -> None:
            later = self.open_folder(options, start, saved, resume, losses)
            counts = {"images": images} | ({} if labelled is None else {"labelled": labelled})
            given = differing(options, self.defaults, unused)
            self.log.line(f"options: {given} (with the defaults: {self.folder}/config.yaml)")
            self.record_start(options, start, counts, own_batch, losses)
            if saved:
                self.record_resume(options, start, saved, later)

        self.on_first(write)
        set_apart()
        if self.device.type == "cpu":
            keep_freed_memory()

    def open_folder(
        self,
        options: dict,
        start: Position,
        saved: dict | None,
        resume: str,
        losses: Sequence[str],
    ) -> list[str]:
        """Write the options, open log and records, and return the names of later checkpoints."""
        holds_run = bool(self.checkpoints.paths())
        if saved is None and holds_run:
            raise RunError(
                f"{self.folder} holds a run already: add --resume auto to resume it, or choose "
                "another --out"
            )
        if self.events_every:
            events.require()
        callbacks = load(options.get("log_to", ()), self.callbacks)
        try:
            os.makedirs(self.folder, exist_ok=True)
            if os.path.exists(self.complete):
                os.remove(self.complete)
            if saved is None:
                forget_trackers(self.folder)
            later = self.checkpoints.resume_at(start, resume) if saved else []
            later = [os.path.basename(path) for path in later]
            text = yaml.safe_dump(options, sort_keys=False)
            write_whole(os.path.join(self.folder, "config.yaml"), text.encode())
            recorded = self.log.open(self.folder, start, options, callbacks)
            if holds_run and recorded < (done := self.count.at(*start)):
                missing = f"the records of steps {recorded + 1} to {done}"
                self.log.line(
                    f"{self.folder}/metrics.jsonl: {missing} are missing; the run continues"
                )
            if later:
                names = ", ".join(later)
                self.log.line(
                    f"going back: {names} now end with {LEFT}, and the first save removes them"
                )
            if self.events_every:
                warn = partial(self.warn, "event_files")
                self.log.events = events.Events(
                    self.folder, start, self.count, self.events_every, losses, warn
                )
        except OSError as error:
            raise RunError(
                f"cannot write to {self.folder}: {error.strerror}; choose another --out"
            ) from None
        return later

    def record_start(
        self,
        options: dict,
        start: Position,
        counts: dict[str, int],
        own_batch: int,
        losses: Sequence[str],
    ) -> None:
        """Record the options, images and setting of a run.

        counts: of "images", and of those "labelled", if known. own_batch: images of a worker in a
        step.
        """
        steps = self.count.an_epoch
        self.log.record(
            "start",
            f"{counts['images']} images, {steps} steps an epoch, {own_batch} images a worker and "
            "step",
            epoch=start.epoch,
            step=start.step,
            options=options,
            **counts,
            steps_an_epoch=steps,
            losses=losses,
            **self.setting,
        )

    def record_resume(self, options: dict, start: Position, saved: dict, later: list[str]) -> None:
        """Record the checkpoint that a run resumes from, and a change of its batch or images."""
        facts = {"workers": saved["workers"], "later": later}
        self.log.record("resumed", epoch=start.epoch, step=start.step, **facts)
        if record := change(saved, options["batch_size"], self.count.an_epoch):
            self.log.record("change", **record)

    def save(self, content: dict, is_best: bool = False) -> str:
        """Save a checkpoint after its records, record it, and return its path. On rank 0 only."""
        start = time.perf_counter()
        self.log.sync()
        path = self.checkpoints.save(content, is_best)
        seconds = time.perf_counter() - start
        self.log.record(
            "saved",
            f"saved {path}",
            epoch=content["epoch"],
            step=content["step"],
            path=path,
            seconds=seconds,
        )
        return path

    def stopped(self) -> None:
        """Record that a signal has ended the run."""
        self.log.record(
            "end",
            "stopped by a signal; --resume auto continues from here",
            how="stopped",
            text="",
            code=0,
        )

    def end(self, line: str) -> None:
        """Log and record the run's last line, and write it to the file `complete`. A collective."""
        self.log.record("end", line, how="complete", text=line, code=0)

        def mark() -> None:
            self.log.sync()
            try:
                write_whole(self.complete, f"{line}\n".encode())
            except OSError as error:
                raise RunError(
                    f"cannot write {self.complete}: {error.strerror}; the run is done otherwise"
                ) from None

        self.on_first(mark)

    def note_bad_images(self, files: list[str], limit: int, images: Images) -> None:
        """Log undecodable files that are new to all workers. A collective.

        files: of `images`, each as "path: problem". A file counts once, also if a list names it
        twice. Files that earlier processes of the run recorded count too, also if the data has
        moved since.
        RunError: they are more than `limit`, or all `images`.
        """
        folder = os.path.dirname(printable(images.common_root))
        named = {file for own in allgather(files, "bad_images") for file in own}
        below = {file.removeprefix(os.path.join(folder, "")) for file in named}
        new = sorted(below - self.bad_images)
        self.bad_images.update(new)
        for file in new:
            path = os.path.join(folder, file)  # a list can have absolute paths
            self.log.record("undecodable", f"cannot decode {path}; it is skipped", text=path)
        # If no image can be decoded, each search for a decodable one has listed all.
        none_left = lists_all(named, images)
        bad = len(images) if none_left else len(self.bad_images)
        if none_left or bad > limit:
            first = os.path.join(folder, min(self.bad_images))
            count = f"{bad} of {len(images)} images cannot be decoded"
            raise RunError(f"{count}, and --max-bad-images is {limit}; the first: {first}")


def lists_all(files: Iterable[str], images: Images) -> bool:
    """Return whether all images are among undecodable files, each "path: problem"."""
    paths = {file[: colon.start()] for file in files for colon in re.finditer(": ", file)}
    return all(printable(images.path(index)) in paths for index in range(len(images)))
