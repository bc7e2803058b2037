"""Write the index of existing tar shards of any origin. A run needs it to find their images."""

import itertools
import os

from job.data import imagenet
from job.data.selection import Selection, Tally
from job.data.shards import INDEX, SPLITS, save_index
from job.data.tars import Shard, read_shard
from job.errors import RunError
from job.metrics.log import Log
from job.text import printable


def index(data: str, log: Log) -> dict[str, list[Shard]]:
    """Write an index into the folder of each split of `data`. Return {split: shards}.

    Log the files left out, and the images without a label.
    RunError: shards are missing or incomplete.
    """
    folders = {split: os.path.join(data, split) for split in SPLITS}
    if not os.path.isdir(folders["train"]):
        folders["train"] = data
    selections = {split: Selection() for split in SPLITS}
    tars = {split: tar_files(folder, selections[split]) for split, folder in folders.items()}
    files = {split: names for split, names in tars.items() if names}
    if not files:
        loose = f". Move or link the tar files of {data} into such folders"
        expected = f"{data}/train/*.tar and {data}/val/*.tar, not compressed"
        fix = loose if tar_files(data, Selection()) else ""
        raise RunError(f"no shards in {data}; expected {expected}{fix}")
    shards: dict[str, list[Shard]] = {split: [] for split in files}
    done, total = 0, sum(map(len, files.values()))
    for split, names in files.items():
        for name in names:
            shards[split].append(read_shard(os.path.join(folders[split], name), selections[split]))
            done += 1
            log.progress(f"indexing: {done} of {total} shards", done, total, -(-total // 100))
        if folders[split] == data and ".tar" in selections[split].left_out.kinds:
            raise tar_of_tars(data, selections[split])
        if not any(shard.names for shard in shards[split]):
            left_out = selections[split].report(folders[split])
            if ".tar" in selections[split].left_out.kinds:
                left_out += f". Extract a tar of tars there: tar -xf FILE -C {folders[split]}"
            expected = "expected <key>.jpg, .png, ..."
            raise RunError(f"no images in the shards of {folders[split]}; {expected}: {left_out}")
    label_imagenet(folders, shards, selections)
    classes = class_names([shard for some in shards.values() for shard in some])
    for split, some in shards.items():
        save_index(folders[split], classes, some)
        for line in (
            selections[split].report(folders[split]),
            unlabelled(folders[split], selections[split]),
        ):
            if line:
                log.line(line)
    return shards


def tar_of_tars(data: str, selection: Selection) -> RunError:
    """Return the error of a tar file of tar files, such as ImageNet's download."""
    _, example = selection.left_out.kinds[".tar"]
    return RunError(
        f"a tar file in {data} holds tar files, such as {printable(example)}; expected images."
        f" Extract it into {data}/train, and move the validation images' tar file into {data}/val"
    )


def label_imagenet(
    folders: dict[str, str],
    shards: dict[str, list[Shard]],
    selections: dict[str, Selection],
) -> None:
    """Label the images of ImageNet's own tar files, which have no labels.

    Their names get the class's folder.
    """
    bare = [
        split
        for split, some in shards.items()
        if not any(label >= 0 for shard in some for label in shard.labels)
    ]
    classes_of = {
        split: imagenet.classes_of_shards(folders[split], shards[split]) for split in bare
    }
    every = sorted({name for names in classes_of.values() for name in names if name})
    number = {name: label for label, name in enumerate(every)}
    for split in (split for split in bare if classes_of[split]):
        classes = iter(classes_of[split])
        for shard in shards[split]:
            own = list(itertools.islice(classes, len(shard.names)))
            shard.labels = [number.get(name, -1) for name in own]
            pairs = zip(own, shard.names, strict=True)
            shard.names = [f"{folder}/{name}" if folder else name for folder, name in pairs]
        selections[split].unlabelled = Tally()


def tar_files(folder: str, selection: Selection) -> list[str]:
    """Return the sorted names of a folder's tar files, and count its other files.

    The folder may be missing.
    """
    if not os.path.isdir(folder):
        return []
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    entries = [
        entry
        for entry in entries
        if entry.name != INDEX and selection.keeps(entry.name, entry.name)
    ]
    tars = []
    for entry in entries:
        if entry.name.lower().endswith(".tar") and entry.is_file():
            tars.append(entry.name)
        elif entry.name not in SPLITS:
            selection.left_out.add("in no tar file", entry.name)
    return tars


def unlabelled(root: str, selection: Selection) -> str:
    """Return a line about the images of `root` without a label, or "" without such."""
    count = selection.unlabelled.total
    needs = "job.train does not need labels, k-NN and job.linear do"
    text = f"{count} of {selection.taken} images in {root} have no label: {selection.unlabelled}"
    return f"{text}. {needs}" if count else ""


def class_names(shards: list[Shard]) -> list[str]:
    """Return the names of the classes, or [] if no image has a label.

    They are the top folders of the images' names if each class has its own, else the labels.
    """
    folders_of: dict[int, set[str]] = {}  # label -> folders
    for shard in shards:
        for label, name in zip(shard.labels, shard.names, strict=True):
            if label >= 0:
                folders_of.setdefault(label, set()).add(
                    name.removeprefix("./").rpartition("/")[0].split("/")[0]
                )
    own = {label: min(folders) for label, folders in folders_of.items() if len(folders) == 1}
    if len(set(own.values()) - {""}) < len(folders_of):
        own = {}
    return [own.get(label, str(label)) for label in range(max(folders_of, default=-1) + 1)]
