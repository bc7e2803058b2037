"""Write the features of a folder of images by a checkpoint to a file, with the images' paths.

horovodrun -np N python -m job.embed DIR --pretrained CHECKPOINT --out features.npy
"""

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from job import cli
from job.checkpoints.foreign import Backbone, digest, read_backbone
from job.cluster import exits, task
from job.cluster.stop import Stopped
from job.data.splits import Split, Splits, find_images
from job.declare import option
from job.engine.call import called
from job.engine.run import Run
from job.errors import RunError, of_option
from job.evaluate.features import GROUP, Group, Pass, build_encoder, split_groups
from job.evaluate.rows import Rows
from job.evaluate.tables import FORMATS, check_place, ending
from job.networks import ARCHS, check_name
from job.options import ImageOptions
from job.text import plural

DATA = "folder of images, a text file with a path a line, or the word digits"
PRETRAINED = "checkpoint of the network: a run's, or another file that --teacher reads"
ARCH = "the network (default: that of --pretrained)"
IMAGE_SIZE = "side of the centre crops in pixels (default: the checkpoint's, or 224)"
OUT = "file to write: .npy, with the paths in a .json file next to it, or .parquet"
HELP = "(all options: --help)"


@dataclass(frozen=True)
class NetworkOptions:
    """Network."""

    group = "network"

    pretrained: str = option("", PRETRAINED, path=True)
    arch: str = option("", ARCH, "-a", choices=("", *ARCHS), others=check_name)
    head: bool = option(False, "the outputs of the checkpoint's head, not the features under it")
    precision: str = option("float32", "bf16: autocast", choices=("float32", "bf16"))


@dataclass(frozen=True)
class OutputOptions:
    """Output."""

    group = "output"

    config: list[str] = option([], "a YAML file; can be repeated", many=True, path=True)
    out: str = option("", OUT, path=True)
    force: bool = option(False, "overwrite --out if it exists")


@dataclass(frozen=True)
class EmbedConfig(OutputOptions, NetworkOptions, ImageOptions):
    """Compute the features of images by a checkpoint."""

    data: str = option("", DATA, path=True)
    image_size: int = option(0, IMAGE_SIZE, at_least=0, at_most=4096)

    def __post_init__(self) -> None:
        if not self.pretrained:
            raise RunError(f"--pretrained: missing; expected the checkpoint of a network {HELP}")
        if not self.out:
            raise RunError(
                f"--out: missing; expected a file ending in {' or '.join(FORMATS)} {HELP}"
            )


def main(argv: list[str] | None = None) -> None:
    """Run `job.embed` on the command line's options."""
    with exits.reported_errors():
        argv = sys.argv[1:] if argv is None else argv
        config, _ = cli.read("job.embed", EmbedConfig, argv)
        with Run(f"{config.out}.part", keep=1, options=dataclasses.asdict(config)) as run:
            try:
                write_features(config, run)
            except Stopped:
                run.stop.ignore()
                raise RunError(incomplete(config, "command"), code=1) from None


def embed(config: EmbedConfig) -> str:
    """Compute features from a script or a notebook, as `job.embed` does on the command line.

    config: the options, by their names there. Return the path of the file.
    All else is as in `job.train.train`.
    """
    config = cli.checked(config)
    run = Run(f"{config.out}.part", keep=1, options=dataclasses.asdict(config))
    with called(run, incomplete(config, "call")):
        write_features(config, run)
    return config.out


def incomplete(config: EmbedConfig, again: str) -> str:
    """Return the error of a stop. again: the user resumes by the same command, or call."""
    return f"stopped by a signal: {config.out} is incomplete. Resume with the same {again}"


def write_features(config: EmbedConfig, run: Run) -> None:
    """Write the features of all decodable images to --out. A collective.

    RunError, on all workers: an option, a file or the disk is at fault. Stopped: a signal arrived.
    The features so far are kept in both cases.
    """
    run.on_first(lambda: check_place(config.out, config.force))
    with of_option("--pretrained", config.pretrained):
        weights = run.on_first(lambda: read_backbone(config.pretrained, config.arch, "--arch"))
    run.log.line(f"network: {weights.report}")
    config = complete(config, weights)
    size = config.image_size
    head, path = config.head, config.pretrained
    encoder = run.build(weights.arch, lambda: build_encoder(weights, head, path, size))
    encoder = encoder.to(run.device)
    splits = Splits(run.on_first(lambda: find_images(config.data)))
    for line in filter(None, (split.images.left_out for split in splits.parts)):
        run.log.line(line)
    compute = Pass(encoder, config.image_size, config.precision, config.workers, run)
    origin = describe_origin(config, weights, splits)
    # Two folders can have the same names of images. The features' file has no path of a machine.
    rows = Rows(run.folder, origin | {"data": os.path.realpath(config.data)}, compute.width)
    state = run.on_first(rows.open)
    bad = compute_all(compute, splits, rows, *state, config)
    about = {"checkpoint": os.path.basename(os.path.realpath(config.pretrained))}
    about |= {"epoch": weights.meta["epoch"]} | origin
    run.log.line(run.on_first(lambda: finish(config, splits, rows, bad, about)))


def complete(config: EmbedConfig, weights: Backbone) -> EmbedConfig:
    """Return the options with the checkpoint's image size and the number of loader processes.

    RunError: the image size is under 8.
    """
    trained = weights.meta["config"].get("image_size") or weights.image_size
    size = config.image_size or trained or 224
    if not isinstance(size, int) or not 8 <= size <= 4096:
        raise RunError(f"--image-size {size}: expected 8 to 4096. Choose another")
    workers = task.cores() if config.workers < 0 else config.workers
    return dataclasses.replace(config, image_size=size, workers=workers)


def describe_origin(config: EmbedConfig, weights: Backbone, splits: Splits) -> dict[str, Any]:
    """Return the inputs of the features, except program and machine, in JSON's types."""
    return {
        "features": "outputs of the head" if config.head else pooled_by(weights),
        "network": weights.digest,
        "head": digest(weights.head_state) if config.head else "none",
        "arch": weights.arch,
        "stem": weights.stem,
        "width": weights.width,
        "image_size": config.image_size,
        "precision": config.precision,
        "images": len(splits),
        "names": splits.digest,
        "group": GROUP,
        **({} if weights.is_resnet else {"input": weights.input}),
    }


def pooled_by(weights: Backbone) -> str:
    """Return how a network pools its features."""
    return "pooled after the last ReLU" if weights.is_resnet else "pooled, under the head"


def compute_all(
    compute: Pass,
    splits: Splits,
    rows: Rows,
    done: int,
    bad: dict[int, str],
    config: EmbedConfig,
) -> dict[int, str]:
    """Compute the groups after the first `done`, and append them to `rows`. A collective.

    bad: {number: problem} of undecodable images in the done groups. Return it for all groups.
    RunError, on all workers: too many images are undecodable.
    """
    bad, run = dict(bad), compute.run
    groups = [(split, group) for split in splits.parts for group in split_groups(split.images)]
    progress = Progress(run, len(splits), sum(len(group) for _, group in groups[:done]))
    if done:
        run.log.line(f"resuming: {progress.done} of {len(splits)} images are done")
    check_bad(bad, splits, config)
    for split in splits.parts:
        left = [group for owner, group in groups[done:] if owner is split]
        for computed in compute.rounds(split.images, left):
            append(computed, split, splits, rows, bad, config, run)
            progress.add(sum(len(features) + len(problems) for features, problems in computed))
            check_bad(bad, splits, config)
    return bad


def append(
    computed: list[Group],
    split: Split,
    splits: Splits,
    rows: Rows,
    bad: dict[int, str],
    config: EmbedConfig,
    run: Run,
) -> None:
    """Append groups of a split to `rows`, and their undecodable images to `bad`. A collective.

    RunError, on all workers: a feature is not finite, or the disk is full.
    """
    numbered = []
    for features, problems in computed:
        if not features.isfinite().all():
            problem = f"{config.pretrained}: features that are not finite"
            raise RunError(f"{problem}; expected finite values. Check the checkpoint", code=1)
        numbered.append({split.first + index: text for index, text in problems.items()})
        for number, text in numbered[-1].items():
            run.log.line(f"cannot decode {splits.full_path(number)}: {text}; it has no row")
        bad |= numbered[-1]

    def write() -> None:
        for (features, _), problems in zip(computed, numbered, strict=True):
            rows.append(features.numpy(), problems)

    run.on_first(write)


def check_bad(bad: dict[int, str], splits: Splits, config: EmbedConfig) -> None:
    """RunError: too many files are undecodable, or all. A file named twice counts once."""
    different = {splits.full_path(number) for number in bad}
    none_left = len(bad) == len(splits)
    if none_left or len(different) > config.max_bad_images:
        number = len(bad) if none_left else len(different)
        count = f"{number} of {len(splits)} images cannot be decoded"
        first = splits.full_path(min(bad))
        limit = f"--max-bad-images is {config.max_bad_images}"
        raise RunError(f"{count}, and {limit}; the first: {first}")


def finish(
    config: EmbedConfig,
    splits: Splits,
    rows: Rows,
    bad: dict[int, str],
    about: dict[str, Any],
) -> str:
    """Write --out, remove the folder of `rows`, and return the last line.

    about: the description of the features in the file. RunError: the disk is full.
    """
    write = FORMATS[ending(config.out)]
    paths = [splits.path(number) for number in range(len(splits)) if number not in bad]
    about["undecodable"] = [[splits.path(number), bad[number]] for number in sorted(bad)]
    try:
        reading = write(config.out, rows, paths, about)
    except OSError as error:
        problem = f"cannot write {config.out}: {error.strerror or error}"
        raise RunError(f"{problem}. Make room, and resume with the same command", code=1) from None
    rows.remove()
    have = "has" if len(bad) == 1 else "have"
    without = f"; {plural(len(bad), 'undecodable image')} {have} no row" if bad else ""
    shape = f"{len(paths)} x {rows.width} float32"
    return f"wrote {config.out}: {shape}{without}; read it with: {reading}"


class Progress:
    """The number of images done, logged at each percent, and on a terminal after each round."""

    def __init__(self, run: Run, total: int, done: int):
        self.run, self.total, self.done = run, total, done
        self.before, self.since, self.percent = done, time.monotonic(), -1

    def add(self, images: int) -> None:
        """Count images, and log."""
        self.done += images
        percent = 100 * self.done // self.total
        if percent == self.percent and not sys.stdout.isatty():
            return
        self.percent = percent
        rate = (self.done - self.before) / max(1e-9, time.monotonic() - self.since)
        left = (self.total - self.done) / rate
        text = f"{self.done} of {self.total} images, {rate:.0f} images/s, {left:.0f} s left"
        self.run.log.progress(text, self.done, self.total, 1)


if __name__ == "__main__":
    main()
