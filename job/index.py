"""Make the index of tar shards that are there, whoever wrote them; without it a run could not find an image in them."""

import os

from job.data.shards import save_index
from job.data.tars import Shard, read_shard
from job.errors import RunError
from job.run.log import Log

SPLITS = ("train", "val", "valid")


def index(data: str, log: Log) -> dict[str, list[Shard]]:
    """Write an index beside the shards of each split of `data`; return what they hold. RunError: there are none, or not whole."""
    folders = {split: os.path.join(data, split) for split in SPLITS}
    files = {split: tar_files(folder) for split, folder in folders.items() if tar_files(folder)}
    if not files:
        loose = f"; move or link those of {data} into such folders" if tar_files(data) else ""
        raise RunError(f"no shards in {data}: expected {data}/train/*.tar, and val/ beside it, not compressed{loose}")
    shards: dict[str, list[Shard]] = {split: [] for split in files}
    done, total = 0, sum(map(len, files.values()))
    for split, names in files.items():
        for name in names:
            shards[split].append(read_shard(os.path.join(folders[split], name)))
            done += 1
            log.progress(f"indexing: {done} of {total} shards", done, total, -(-total // 100))
        if not any(shard.names for shard in shards[split]):
            raise RunError(f"no images in the shards of {folders[split]}: expected <key>.jpg, .png, ... and <key>.cls in them")
    classes = class_names([shard for some in shards.values() for shard in some])
    for split, some in shards.items():
        save_index(folders[split], classes, some)
    return shards


def tar_files(folder: str) -> list[str]:
    """The names of a folder's tar files, sorted; none where there is no folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".tar") and entry.is_file())


def class_names(shards: list[Shard]) -> list[str]:
    """The folders that the images' names begin with, where each class has one of its own; otherwise the labels as text."""
    found: dict[int, set[str]] = {}  # label -> folders
    for shard in shards:
        for label, name in zip(shard.labels, shard.names, strict=True):
            found.setdefault(label, set()).add(name.rpartition("/")[0].split("/")[0])
    own = {label: min(folders) for label, folders in found.items() if len(folders) == 1}
    if len(set(own.values()) - {""}) < len(found):
        own = {}
    return [own.get(label, str(label)) for label in range(max(found) + 1)]
