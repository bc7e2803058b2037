"""Checkpoint files: written completely or not at all, and read without running their code."""

import contextlib
import errno
import filecmp
import functools
import os
import pickle
import re
import shutil
from collections.abc import Callable

import torch
import yaml

from job import __version__
from job.checkpoints.seal import seal, verify
from job.checkpoints.stand_ins import Inert, stand_ins
from job.cluster.memory import at_most
from job.errors import RunError
from job.files import ReadError, patient, sync_folder, write_whole
from job.position import Position

FORMAT = 3
LAST, BEST = "last.pth.tar", "best.pth.tar"
AUTO = "auto"  # the value of --resume for the newest checkpoint in the run's folder
DECISION = "resumed.yaml"  # the checkpoint from which --resume PATH has resumed, and the SLURM job
JOB = "SLURM_JOB_ID"  # a requeued job keeps it
LEFT = ".left"  # ends the names of checkpoints later than the one that the run resumed from
NAME = re.compile(r"checkpoint_(\d{4,})_(\d{6,})\.pth\.tar")
ROOM = 2**30  # bytes that a load or its result may need, in addition to twice the file's size
TORCH = (b"PK\x03\x04", b"\x80")  # starts of torch's files: archives, and pickles before torch 1.6
OBJECT = 256  # bytes that each value counts at least


class Checkpoints:
    """The newest `keep` checkpoints of a run's folder: checkpoint_EPOCH_STEP.pth.tar."""

    def __init__(self, folder: str, keep: int):
        self.folder, self.keep = folder, keep
        self.named = ""  # the checkpoint that the user gave to --resume

    def paths(self) -> list[str]:
        """Return the paths of the checkpoints, oldest first."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return [
            os.path.join(self.folder, name)
            for name in sorted(filter(NAME.fullmatch, names), key=position)
        ]

    def has(self, epoch: int, step: int) -> bool:
        """Return whether a position has a checkpoint."""
        return os.path.exists(os.path.join(self.folder, name_at(epoch, step)))

    def resume_at(self, start: Position, source: str) -> list[str]:
        """Let a run that is killed before its first save resume at `start`, (epoch, step), again.

        Later checkpoints are renamed, so that no run resumes from them, and the first save removes
        them. last.pth.tar becomes the checkpoint of `start`.
        source: the option --resume, "auto" or a checkpoint. A checkpoint in another folder gets a
        second name in this one. It is not removed.
        Return the later checkpoints, oldest first. OSError: the folder cannot be written to.
        """
        path = os.path.join(self.folder, name_at(*start))
        if source != AUTO and not (os.path.exists(path) and os.path.samefile(source, path)):
            self.remove_half_written()
            duplicate(os.path.realpath(source), path + ".new")
            with contextlib.suppress(FileNotFoundError):  # a different checkpoint of this position
                os.replace(path, path + LEFT)
            os.replace(path + ".new", path)
        self.point_last_to(path)
        later = [path for path in self.paths() if position(path) > start]
        for path in reversed(later):  # newest first, so that a kill leaves no gap
            os.replace(path, path + LEFT)
        # Without these names, the decision would resume from a later checkpoint.
        sync_folder(self.folder)
        if source != AUTO:
            self.named = os.path.realpath(source)
            decision = {
                "job": os.environ.get(JOB, ""),
                "restarts": restarts(),
                "checkpoint": os.path.abspath(source),
            }
            write_whole(os.path.join(self.folder, DECISION), yaml.safe_dump(decision).encode())
        return later

    def resumed_before(self, source: str) -> bool:
        """Return whether an earlier try of this SLURM job resumed from the checkpoint `source`."""
        try:
            with open(os.path.join(self.folder, DECISION)) as file:
                decision = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError):
            return False
        this = {"job": os.environ.get(JOB), "checkpoint": os.path.abspath(source)}
        return any(decision == this | {"restarts": earlier} for earlier in range(restarts()))

    def point_last_to(self, path: str) -> None:
        """Let last.pth.tar be the checkpoint `path`. OSError: it cannot be written."""
        last = os.path.join(self.folder, LAST)
        if os.path.realpath(last) == os.path.realpath(path):
            return
        if (
            os.path.isfile(last)
            and not os.path.islink(last)
            and filecmp.cmp(last, path, shallow=False)
        ):  # without links
            return
        with contextlib.suppress(FileNotFoundError):
            os.remove(last + ".new")
        link_or_copy(path, path, last + ".new")
        os.replace(last + ".new", last)

    def save(self, content: dict, best: bool = False) -> str:
        """Write a checkpoint, let `last.pth.tar` be it, remove the oldest; return its path.

        A name appears only when its file is complete and on disk. The `best` becomes `best.pth.tar`
        first: after a kill between the two, the resumed run finds the same best again.
        RunError: the file cannot be written. Half-written files are removed, earlier checkpoints
        stay.
        """
        name = name_at(content["epoch"], content["step"])
        path, last_path, best_path = (
            os.path.join(self.folder, each) for each in (name, LAST, BEST)
        )
        try:
            self.remove_half_written()  # of a killed run; the disk may lack their space
            write({**content, "format": FORMAT, "version": __version__}, path + ".new")
            if best:  # not a symbolic link, because best stays when `path` is removed
                duplicate(path + ".new", best_path + ".new")
                os.replace(best_path + ".new", best_path)
            link_or_copy(path, path + ".new", last_path + ".new")
            os.replace(path + ".new", path)
            os.replace(last_path + ".new", last_path)
            sync_folder(self.folder)
            self.remove_but_newest(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.remove_half_written()
            others = (
                "the checkpoints before it are untouched"
                if os.path.isdir(self.folder)
                else "the folder is gone"
            )
            raise RunError(
                f"cannot save {path}: {error.strerror or error}; {others}. "
                "When files can be written there, resume with --resume auto"
            ) from None
        return path

    def remove_but_newest(self, path: str) -> None:
        """Remove old checkpoints after `path` was saved.

        The newest --keep checkpoints up to `path`, and the one that --resume names, stay.
        """
        paths = self.paths()
        done = paths.index(path) + 1  # the run has gone back before all later ones
        names = (
            name
            for name in os.listdir(self.folder)
            if name.endswith(LEFT) and NAME.fullmatch(name.removesuffix(LEFT))
        )
        left = [os.path.join(self.folder, name) for name in names]
        for old in paths[: max(0, done - self.keep)] + paths[done:] + left:
            if os.path.realpath(old) != self.named:
                os.remove(old)

    def remove_half_written(self) -> None:
        """Remove files whose writing was interrupted."""
        for name in os.listdir(self.folder):
            if name.endswith(".pth.tar.new"):
                os.remove(os.path.join(self.folder, name))

    def newest(self, log: Callable[[str], None]) -> dict | None:
        """Return the newest undamaged checkpoint, or None if the folder has no checkpoint.

        log: logs a line about each damaged checkpoint, and about the one to resume from.
        RunError: no checkpoint can be loaded, or the file system fails.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                content = patient(functools.partial(load_once, path), path)
            except ReadError:  # it may be undamaged, and an older one would lose later steps
                raise
            except RunError as error:
                log(f"skipped: {error}")
                continue
            log(f"resuming from {path}")
            return content
        if paths:
            raise RunError(
                f"{self.folder}: none of the {len(paths)} checkpoints can be loaded: move them "
                "away to start a new run"
            )
        return None


def restarts() -> int:
    """Return how often SLURM has restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def name_at(epoch: int, step: int) -> str:
    """Return the file name of a position's checkpoint."""
    return f"checkpoint_{epoch:04d}_{step:06d}.pth.tar"


def position(path: str) -> Position:
    """Return the (epoch, step) in a checkpoint's name."""
    match = NAME.fullmatch(os.path.basename(path))
    assert match
    return Position(int(match[1]), int(match[2]))


def write(content: dict, path: str) -> None:
    """Write a file by torch.save, add its checksum, and sync it to disk.

    OSError: the file cannot be written.
    """
    with open(path, "w+b") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's error for a failed write names only positions
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        seal(file)
        file.flush()
        os.fsync(file.fileno())


def link_or_copy(path: str, source: str, new: str) -> None:
    """Make `new` a symbolic link to `path`, in the same folder.

    On a file system without symbolic links, `new` becomes a second name of `source`.
    """
    try:
        os.symlink(os.path.basename(path), new)
    except OSError:
        duplicate(source, new)


def duplicate(path: str, new: str) -> None:
    """Give the file `path` a second name `new`: a hard link, or a copy if links fail.

    File systems refuse links with many errors. An error that is not about links occurs again at
    the copy, and is raised there.
    OSError: the file cannot be written, or `new` exists.
    """
    try:
        os.link(path, new)
    except OSError:
        with open(path, "rb") as source, open(new, "xb") as copy:
            shutil.copyfileobj(source, copy, 2**20)
            copy.flush()
            os.fsync(copy.fileno())


def load(path: str, foreign: bool = False) -> dict:
    """Return a checkpoint file's content on the CPU.

    Only tensors, numbers, text and containers are loaded (`weights_only`), so no code can run.
    The file's size limits the memory. Without a limit, a few bytes of a pickle can become a large
    array of zeros, and a tensor that repeats one value grows when it is copied.
    foreign: also read other programs' files. Their harmless objects become an Inert or a plain
    dictionary.
    RunError: the file is missing, not a regular file, truncated or damaged, or contains code.
    """
    try:
        return load_once(path, foreign)
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror}; expected a checkpoint. Check its permissions"
        ) from None


def load_once(path: str, foreign: bool = False) -> dict:
    """Load as `load` does, but raise OSError if the file system fails."""
    check_is_file(path)
    try:
        most = 2 * os.path.getsize(path) + ROOM
        with at_most(most):
            verify(path)
            with torch.serialization.safe_globals(stand_ins(path) if foreign else []):
                content = torch.load(path, map_location="cpu", weights_only=True)
        check_size(content, most)
    except pickle.UnpicklingError as error:
        name = object_in(str(error))
        if name and begins_as_torchs(path):
            raise RunError(has_objects(path, name, '["state_dict"]')) from None
        raise RunError(incomplete(path, type(error).__name__)) from None
    except RunError:
        raise
    except Exception as error:
        # Damaged bytes lead to invalid positions: EINVAL, or an OSError without a number.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        raise RunError(incomplete(path, reason)) from None
    if isinstance(content, Inert):
        raise RunError(has_objects(path, type(content).__name__, ".state_dict()"))
    if not isinstance(content, dict):
        raise RunError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of tensors. Use "
            "another file"
        )
    return content


def begins_as_torchs(path: str) -> bool:
    """Return whether a file begins as torch's files do. Torch also refuses objects of others."""
    with open(path, "rb") as file:
        return file.read(len(max(TORCH, key=len))).startswith(TORCH)


def incomplete(path: str, reason: str) -> str:
    """Return an error message: the file is not a complete checkpoint."""
    return f"{path} is not a complete checkpoint ({reason}): use another one"


def object_in(error: str) -> str:
    """Return the object that torch refused, from its message, or "" if the file is damaged."""
    if match := re.search(r"GLOBAL (\S+)", error):
        return match[1][:100]
    others = {
        "persistent_load": "a module with its source code",
        "Unsupported operand": "a pickle of protocol 3 or later",
    }
    return next((name for text, name in others.items() if text in error), "")


def has_objects(path: str, name: str, tensors: str) -> str:
    """Return an error message: the file contains the object `name`.

    tensors: the expression that selects the tensors in the loaded file.
    """
    return (
        f"{path} holds code or objects besides tensors ({name}), which are never loaded; expected "
        "a dictionary of tensors. If you trust the file, write one on a machine that can load it: "
        f"torch.save(torch.load(FILE, weights_only=False){tensors}, NEW)"
    )


def check_is_file(path: str) -> None:
    """Check that `path` is a regular file.

    RunError: it is not. For a run's folder, the error names the newest checkpoint.
    """
    if os.path.isdir(path):
        last = os.path.join(path, LAST)
        raise RunError(
            f"{path}: is a folder; expected a checkpoint file"
            + f", such as {last}" * os.path.isfile(last)
        )
    if not os.path.isfile(path):
        problem = "not a regular file" if os.path.exists(path) else "no such file"
        raise RunError(f"{path}: {problem}; expected a checkpoint. Check the path")


def check_size(content: object, most: int) -> None:
    """Check the size of a loaded file's content.

    MemoryError: more than `most` bytes, if tensors are expanded and shared values count each time.
    """
    left, stack = most, [content]
    while stack:
        value = stack.pop()
        left -= max(OBJECT, value.numel() * value.element_size() if torch.is_tensor(value) else 0)
        if left < 0:
            raise MemoryError(f"its content would need more than {most:,} bytes")
        if isinstance(value, dict):
            stack += dict.values(value)  # a file can set its attribute `values`
        elif isinstance(value, (list, tuple, set)):
            stack += value
