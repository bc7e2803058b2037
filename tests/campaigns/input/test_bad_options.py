"""All options of all programs: wrong types, values out of range, and conflicts."""

import dataclasses

import pytest

from cases import LINEAR, SMALL, Case, check
from job.config import Config, LinearConfig
from job.declare import flag
from job.embed import EmbedConfig
from job.pack import Options
from short import short

PROGRAMS = {
    "job.train": Config,
    "job.linear": LinearConfig,
    "job.embed": EmbedConfig,
    "job.pack": Options,
}
WRONG = {
    int: ["many", "1.5", "", "9" * 5000],
    float: ["fast", "", "nan", "1e999"],
    str: ["nosuch"],
    bool: ["1"],
    list[int]: ["x"],
    list[float]: ["x", "nan", "1e999"],
    list[str]: ["nosuch"],
}


def wrong_values(f):
    """Return invalid values of an option's declaration: other types, and values out of range."""
    meta = f.metadata
    any_text = f.type in (str, list[str]) and not (meta["choices"] or meta["parse"])
    values = [] if any_text else list(WRONG[f.type])
    for bound, outside in (("at_least", -1), ("above", 0), ("below", 0), ("at_most", 1)):
        if meta[bound] is not None:
            values.append(str(meta[bound] + outside))
    return [value for value in values if value not in (meta["choices"] or ())]


GENERATED = [
    Case(
        f"{program} {flag(f.name)} {value[:9]!r}",
        ["{good}", *(["OUT"] if program == "job.pack" else []), f"{flag(f.name)}={value}"],
        (
            flag(f.name),
            value[:20].strip("-") or "''",
            "expect" if f.type is not bool else "argument",
        ),
        program,
    )
    for program, options in PROGRAMS.items()
    for f in dataclasses.fields(options)
    if f.name != "config"
    for value in wrong_values(f)
]


def train(name, options, *parts):
    """Return a case of job.train."""
    return Case(name, ["{good}", *SMALL, *options.split()], parts)


def linear(name, options, *parts):
    """Return a case of job.linear."""
    return Case(name, ["{good}", *LINEAR, *options.split()], parts, "job.linear")


def other(program, line, *parts):
    """Return a case of another program."""
    return Case(f"{program} {line}", line.split(), parts, program)


CONFLICTS = [
    Case("no data", [], ("DIR: missing", "folder of images", "digits")),
    Case("no such folder", ["{good}/nowhere", *SMALL], ("{good}/nowhere", "a folder of images")),
    train("no such second folder", "--more-data nowhere", "nowhere", "a folder of images"),
    train("two folders", "--data elsewhere", "{good}", "elsewhere", "expected one"),
    train("an unknown option", "--tempreature 1", "--tempreature", "--help"),
    train("an abbreviated option", "--mom 0.9", "--mom"),
    train("an option without its value", "--lr", "--lr", "argument"),
    train("a retired option", "--dist-url tcp://x", "--dist-url", "horovodrun -np"),
    train("schedule and cos", "--schedule 3 --cos", "--schedule", "--cos", "--no-cos"),
    train("unequal micro-batches", "--accumulate 3", "--accumulate 3", "4 images", "divisor"),
    train(
        "micro-batches of one image",
        "--accumulate 4",
        "--batch-size 4",
        "4 micro-batches",
        "expected 8",
    ),
    train("a batch of one image", "--batch-size 1", "--batch-size 1", "batch norm", "expected 2"),
    train("a batch beyond the images", "--batch-size 10", "8 images", "--batch-size 10", "smaller"),
    train("a missing teacher", "--teacher nowhere", "--teacher nowhere: no such file"),
    train("a missing checkpoint", "--resume nowhere", "--resume nowhere: no such file"),
    train("a folder to resume", "--resume {good}", "{good}", "expected a checkpoint"),
    train("an unwritable folder", "--out /proc/run", "/proc/run", "--out"),
    train("a file for a folder", "--out {good}/train/a/good0.png", "good0.png", "--out"),
    train("an unknown preset", "--config imagent", "imagent", "imagenet, ", ", small"),
    train(
        "a factor and a share",
        "--loss-factor 2 --loss-share 0.1",
        "--loss-factor",
        "--loss-share 0.1",
        "leave out",
    ),
    train(
        "too few weights of stages",
        "--stage-weights 1 2",
        "--stage-weights 1 2",
        "one weight for each",
        "--mgd-stages 1 2 3 4",
    ),
    train(
        "too many weights of stages",
        "--mgd-stages 4 --stage-weights 1 2",
        "--stage-weights 1 2",
        "one weight for each",
    ),
    train("all weights 0", "--stage-weights 0 0 0 0", "--stage-weights 0 0 0 0", "above 0"),
    train(
        "stages out of order",
        "--mgd-stages 4 3 --stage-weights 1 2",
        "--mgd-stages",
        "4 3",
        "ascending",
    ),
    train(
        "a stage twice",
        "--mgd-stages 3 3 --stage-weights 1 2",
        "--mgd-stages",
        "3 3",
        "each once",
    ),
    train(
        "too many weights of distillers",
        "--distill-weights 1 2",
        "one weight for each",
        "--distill mgd",
    ),
    train("a distiller's weight 0", "--distill-weights 0", "--distill-weights 0", "above 0"),
    linear("evaluate without resume", "--evaluate", "--evaluate", "--resume"),
    linear(
        "knn and evaluate", "--knn --evaluate --resume auto", "--knn", "--evaluate", "Leave out"
    ),
    linear(
        "knn and resume", "--knn --resume some.pth.tar", "--knn", "some.pth.tar", "--pretrained"
    ),
    linear("schedule and cos, linear", "--schedule 3 --cos", "--schedule", "--cos", "--no-cos"),
    linear("a small crop", "--image-size 3", "--image-size 3", "8 or more"),
    linear(
        "a batch beyond the images, linear",
        "--batch-size 10",
        "8 images",
        "--batch-size 10",
        "smaller",
    ),
    linear("another program's option", "--moco-k 5", "--moco-k"),
    linear("a missing encoder", "--pretrained nowhere", "--pretrained nowhere: no such file"),
    other("job.export", "", "CHECKPOINT"),
    other("job.export", "nowhere OUT.pth", "nowhere", "no such file"),
    other("job.export", "{good} OUT.pth", "{good}", "expected a checkpoint"),
    other("job.export", "{good}/train/a/good0.png OUT", "OUT", ".onnx", "--format"),
    other("job.export", "{good}/train/a/good0.png OUT.pth", "good0.png", "not a checkpoint", "PNG"),
    other("job.export", "{good}/train/a/good0.png no/OUT.pth", "no/OUT.pth", "Make it first"),
    other("job.export", "x y --format jpeg", "--format", "jpeg", "onnx"),
    other("job.export", "x y.pth --arch vgg", "--arch", "vgg", "resnet18"),
    other("job.export", "x y.onnx --image-size 4", "--image-size", "4", "at least 8"),
    other("job.pack", "{good}", "OUT"),
    other("job.pack", "{good} OUT --index", "OUT", "--index"),
    other("job.pack", "{good}/nowhere OUT", "{good}/nowhere", "a folder of images"),
    other("job.pack", "{good} {good}", "{good}", "Name another one"),
    other("job.pack", "--index {good}", "no shards in {good}", "*.tar"),
]


def test_all_options_are_tested():
    """Every string is a valid file name, so other tests have invalid files."""
    tested = {(case.program, case.argv[-1].split("=")[0]) for case in GENERATED}
    every = {
        (program, flag(f.name))
        for program, options in PROGRAMS.items()
        for f in dataclasses.fields(options)
    }
    untested = {name for _, name in every - tested}
    files = "--data --more-data --config --out --teacher --pretrained --resume"
    assert untested == set(files.split())


SHORT = [
    "job.train --epochs '1.5'",
    "job.train --lr 'nan'",
    "job.train --moco-t '0.0'",
    "job.linear --lr 'fast'",
    "no data",
    "no such folder",
    "an unknown option",
    "a retired option",
    "schedule and cos",
    "a batch beyond the images",
    "a folder to resume",
    "evaluate without resume",
    "job.export nowhere OUT.pth",
    "job.pack {good} {good}",
]


@pytest.mark.parametrize("case", short(GENERATED + CONFLICTS, *SHORT), ids=lambda case: case.name)
def test_option(case, outcomes, values):
    check(case, outcomes, values)
