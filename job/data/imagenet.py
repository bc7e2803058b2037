"""ImageNet's files as downloaded: their classes are names of tar files, or in a table.

The table is Kaggle's LOC_val_solution.csv, or the development kit's ground truth with meta.mat.
"""

import csv
import os
import re
from collections.abc import Iterable, Sequence

from job.data.tars import Shard
from job.errors import RunError

VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
SOLUTION, TRUTH = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"  # the class of each number of the ground truth
WITHIN = ("", "data", "ILSVRC2012_devkit_t12/data")  # folders below a folder that can have tables
ABOVE = 4  # folders above the images that can have tables, as many as in Kaggle's download
EXPECTED = f"{SOLUTION}, or {TRUTH} and {META} of the development kit"


def validation_classes(root: str, names: Sequence[str]) -> list[str]:
    """Return the class of each validation image in `root`, such as n01440764, or "" if unknown.

    The list is empty for images that are not ImageNet's, and without a table.
    RunError: the table is invalid.
    """
    numbers = [number_of(name) for name in names]
    if not any(numbers):
        return []
    if path := find(root, SOLUTION):
        of_number = read_solution(path)
    elif (path := find(root, TRUTH)) and (meta := find(root, META)):
        of_number = read_truth(path, meta)
    else:
        return []
    return [of_number.get(number, "") for number in numbers]


def number_of(name: str) -> int:
    """Return the number of a validation image by its name, from 1; 0 if it is not ImageNet's."""
    match = VALIDATION.fullmatch(os.path.basename(name))
    return int(match[1]) if match else 0


def find(root: str, name: str) -> str:
    """Return the path of a table near the folder `root`, or "" without one."""
    folder = os.path.abspath(root)
    for _ in range(ABOVE + 1):
        for within in WITHIN:
            if os.path.isfile(path := os.path.join(folder, within, name)):
                return path
        folder = os.path.dirname(folder)
    return ""


def read_solution(path: str) -> dict[int, str]:
    """Return {number: class} of Kaggle's table. RunError: it is invalid."""
    try:
        with open(path, newline="") as file:
            rows = [(row["ImageId"], row["PredictionString"]) for row in csv.DictReader(file)]
        return {number_of(f"{image}.JPEG"): boxes.split()[0] for image, boxes in rows}
    except (OSError, ValueError, KeyError, IndexError, AttributeError, csv.Error) as error:
        raise invalid(path, "lines of ImageId,PredictionString", error) from None


def read_truth(path: str, meta: str) -> dict[int, str]:
    """Return {number: class} of the development kit. RunError: one of its files is invalid."""
    from scipy.io import loadmat  # a tenth of a second to import

    try:
        with open(path) as file:
            numbers = [int(line) for line in file if line.strip()]
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnids = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        return {image: str(wnids[number]) for image, number in enumerate(numbers, 1)}
    except Exception as error:  # loadmat raises many kinds on damaged bytes
        raise invalid(f"{path} with {meta}", "a class's number a line", error) from None


def invalid(path: str, expected: str, error: Exception) -> RunError:
    """Return the error of a table that is invalid."""
    problem = f"{type(error).__name__}: {error}"
    return RunError(f"{path} is invalid ({problem}); expected {expected}. Copy it again")


def advice(root: str, names: Iterable[str]) -> str:
    """Return the fix for ImageNet's validation images without a table, or "" for others."""
    if not any(map(number_of, names)):
        return ""
    return f". For ImageNet's validation images put {EXPECTED}, into {root} or a folder above"


def classes_of_shards(root: str, shards: Sequence[Shard]) -> list[str]:
    """Return the class of each image of ImageNet's tar files in `root`, which have no labels.

    A tar file of train/ has one class: n01440764.tar has the images n01440764_*.JPEG. The list is
    empty for other images.
    """
    names = [name for shard in shards for name in shard.names]
    stems = [os.path.splitext(shard.name)[0] for shard in shards for _ in shard.names]
    pairs = zip(names, stems, strict=True)
    if all(os.path.basename(name).startswith(f"{stem}_") for name, stem in pairs):
        return stems
    return validation_classes(root, names)
