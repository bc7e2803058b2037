"""All kinds of folders, lists and shards: images that the command accepts, and errors."""

import io
import tarfile

import pytest

from cases import LINEAR, SMALL, Case, check, fill
from job.data.index import index
from job.metrics.log import Log
from runs import of_kind
from short import short


def listing(path, *lines):
    """Write a list of paths."""
    path.write_text("\n".join(lines) + "\n")


def shard(path, folder, labelled):
    """Write a folder's images into a tar file, with labels if `labelled`."""
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(sorted(folder.glob("*.png"))):
            tar.add(file, f"{number}.png")
            if labelled:
                member = tarfile.TarInfo(f"{number}.cls")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % (number % 2)))


@pytest.fixture(scope="module")
def values(good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    fill(folder / "flat", 8)
    fill(folder / "loose" / "train", 8)
    fill(folder / "nested" / "2024" / "05", 4)
    fill(folder / "nested" / "2025" / "06" / "07", 4)
    fill(folder / "classes" / "a", 4)
    fill(folder / "classes" / "b", 4)
    fill(folder / "classes" / "val" / "a", 2)
    fill(folder / "classes" / "val" / "b", 2)
    fill(folder / "only-val" / "val", 8)
    fill(folder / "splits" / "train set", 4)
    fill(folder / "splits" / "test", 4)
    fill(folder / "alias" / "train" / "b", 8)
    (folder / "alias" / "train" / "a").symlink_to("b")
    (folder / "flat" / "notes.txt").touch()
    names = [f"good{number}.png" for number in range(8)]
    listing(folder / "flat" / "list.txt", "# eight", "", *names)
    listing(folder / "absolute.txt", *(f"{folder}/flat/{name}" for name in names))
    listing(
        folder / "stale.txt",
        *(f"flat/{name}" for name in names),
        "flat/gone.png",
        "nowhere/gone.png",
    )
    listing(folder / "text.txt", "no", "picture")
    (folder / "bad").mkdir()
    for number in range(3):
        (folder / "bad" / f"{number}.png").touch()
    listing(folder / "bad.txt", *(f"bad/{number % 3}.png" for number in range(6)))
    listing(folder / "one-bad.txt", *["bad/0.png"] * 6)
    listing(folder / "twice.txt", *(f"flat/{name}" for name in names), "bad/0.png", "bad/0.png")
    for name, labelled in (("labelled", True), ("bare", False), ("top", True)):
        split = "" if name == "top" else "train"
        (folder / name / split).mkdir(parents=True)
        shard(folder / name / split / "0.tar", folder / "flat", labelled)
        index(str(folder / name), Log(speaks=False))
    return {"good": good, "folder": folder}


def case(name, data, *parts, options="", program="job.train"):
    """Return a case of data. {folder} is the folder of all data."""
    small = SMALL if program == "job.train" else LINEAR
    return Case(name, [*data.split(), *small, *options.split()], parts, program)


# name: data, number of images, and ids of the hints
NO_LABELS = ["unlabelled"]
IDS = {"unlabelled", "other_split", "same_folder"}
TRAINED = {
    "a flat folder": ("{folder}/flat", 8, NO_LABELS),
    "train/ without classes": ("{folder}/loose", 8, NO_LABELS),
    "a nested folder": ("{folder}/nested", 8, []),
    "class folders without train/": ("{folder}/classes", 8, []),
    "a list": ("{folder}/flat/list.txt", 8, NO_LABELS),
    "a list of absolute paths": ("{folder}/absolute.txt", 8, NO_LABELS),
    "two folders": ("{folder}/flat {good}", 16, []),
    "a folder, a list and shards": (
        "{folder}/flat {folder}/absolute.txt {folder}/bare",
        24,
        NO_LABELS,
    ),
    "shards with labels": ("{folder}/labelled", 8, []),
    "shards without": ("{folder}/bare", 8, NO_LABELS),
    "shards without train/": ("{folder}/top", 8, []),
    "a folder of another split": ("{folder}/splits", 8, ["other_split"]),
    "two classes in one folder": ("{folder}/alias", 16, ["same_folder"]),
    "shards of two folders": ("{folder}/labelled {folder}/bare", 16, []),
}
WORK = [case(name, data) for name, (data, _, _) in TRAINED.items()]
WITH_LABELS = [
    case("k-NN of class folders without train/", "{folder}/classes", options="--knn-every 1"),
    case("k-NN of two folders", "{good} {folder}/classes", options="--knn-every 1"),
    case("a classifier of two folders", "{good} {folder}/classes", program="job.linear"),
    case("packing a flat folder", "{folder}/flat", program="job.pack"),
]
WITH_LABELS[-1].argv[1:] = ["OUT"]
NONE = "has a label"
REFUSED = [
    case("k-NN of a flat folder", "{folder}/flat", "{folder}/flat", NONE, options="--knn-every 1"),
    case("k-NN of a list", "{folder}/absolute.txt", "absolute.txt", NONE, options="--knn-every 1"),
    case(
        "a classifier of a flat folder",
        "{folder}/flat",
        "{folder}/flat",
        NONE,
        program="job.linear",
    ),
    case("a classifier of a list", "{folder}/absolute.txt", NONE, program="job.linear"),
    case("a classifier of bare shards", "{folder}/bare", NONE, program="job.linear"),
    case(
        "only validation images", "{folder}/only-val", "name that folder", "{folder}/only-val/val"
    ),
    case(
        "a stale list",
        "{folder}/stale.txt",
        "2 of 10 paths lead to no file",
        "flat/gone.png in line 9",
    ),
    case(
        "a list without images",
        "{folder}/text.txt",
        "no images in {folder}/text.txt",
        "2 without an ending",
    ),
    case("a tar file", "{folder}/bare/train/0.tar", "not a text file", "job.pack --index"),
    case("a missing one of two", "{folder}/flat {folder}/none", "{folder}/none: no such folder"),
    case(
        "a folder twice",
        "{folder}/flat {good} {folder}/flat/",
        "{folder}/flat/: the same images",
        "Name one",
    ),
]
# name: data of only undecodable files, and parts of the error that ends the run
UNDECODABLE = {
    "a list of bad images": ("{folder}/bad.txt", "6 of 6 images", "{folder}/bad/0.png"),
    "a list of one bad image": ("{folder}/one-bad.txt", "6 of 6 images", "{folder}/bad/0.png"),
    "a list and its folder, of bad images": (
        "{folder}/bad.txt {folder}/bad",
        "9 of 9",
        "{folder}/bad/0.png",
    ),
}
ENDED = [case(name, data) for name, (data, *_) in UNDECODABLE.items()]
TWICE = case(
    "a bad image twice in a list",
    "{folder}/twice.txt",
    options="--max-bad-images 1 --batch-size 10",
)


SHORT_WORK = ["a flat folder", "a folder, a list and shards", "a folder of another split"]


@pytest.mark.parametrize("case", short(WORK, *SHORT_WORK), ids=lambda case: case.name)
def test_images_train(case, outcomes):
    outcome, folder = outcomes[case.name]
    outcome.worked()
    _, images, ids = TRAINED[case.name]
    run = folder / "runs" / "resnet18"
    [start] = of_kind(run, "start")
    hints = {hint["id"]: hint["text"] for hint in of_kind(run, "hint")}
    assert (start["images"], [id for id in hints if id in IDS]) == (images, ids)
    assert ("have no labels. Training needs none" in str(hints)) == (ids == NO_LABELS)


SHORT_LABELS = [
    "packing a flat folder",
    "k-NN of a flat folder",
    "a classifier of a list",
    "a stale list",
    "a tar file",
    "a missing one of two",
]


@pytest.mark.parametrize(
    "case", short([*WITH_LABELS, *REFUSED], *SHORT_LABELS), ids=lambda case: case.name
)
def test_labels_for_knn_and_classifiers(case, outcomes, values):
    check(case, outcomes, values)


@pytest.mark.parametrize("case", short(ENDED, "a list of bad images"), ids=lambda case: case.name)
def test_undecodable_list_ends_the_run(case, outcomes, values):
    outcome, folder = outcomes[case.name]
    parts = [part.format(**values) for part in UNDECODABLE[case.name][1:]]
    outcome.refused("cannot be decoded", *parts)
    assert not (folder / "runs" / "resnet18" / "last.pth.tar").exists()


@pytest.mark.parametrize("case", [TWICE], ids=lambda case: case.name)
def test_undecodable_file_counts_once(case, outcomes):
    outcome, folder = outcomes[case.name]
    outcome.worked()
    records = of_kind(folder / "runs" / "resnet18", "undecodable")
    assert [record["text"].count("bad/0.png") for record in records] == [1]
