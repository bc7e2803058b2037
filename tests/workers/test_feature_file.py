"""A file of features as the teacher: each worker's targets are the rows of the images it has read.

An image has one colour, and so do its views. Its row has that colour.
"""

import json

import numpy as np
import pytest
import torch

from job.cluster import comm
from job.cluster.objects import allgather
from job.distill.feature_teacher import check_rows, find_rows
from job.errors import RunError
from job.position import Position
from steps import build_training

B, T, STEPS = 4, 6, 3
OPTIONS = {"framework": "none", "distill": ["simreg"], "weak_views": True, "width": 16}
OPTIONS |= {"stem": "small", "image_size": 16, "max_bad_images": 3, "epochs": STEPS}


def features(number):
    """The row of an image: its colour, and numbers above 0."""
    return np.arange(number, number + T, dtype=np.float32)


def build(run, folder, bad=(), added=None, **options):
    """Build a training from the features of all images, except undecodable ones. A collective.

    bad: numbers of undecodable images. added: {number: value} to add to the rows of images.
    """
    folder.mkdir(exist_ok=True)
    total = comm.size() * B
    numbers = [number for number in range(total) if number not in bad]
    rows = np.stack([features(number) for number in numbers])
    for number, value in (added or {}).items():
        rows[numbers.index(number)] += value
    paths = [f"train/one/{number}.png" for number in numbers]
    undecodable = [[f"train/one/{number}.png", "no image"] for number in bad]
    np.save(folder / "teacher.npy", rows[::-1])
    content = {"paths": paths[::-1], "undecodable": undecodable}
    (folder / "teacher.json").write_text(json.dumps(content))
    options |= {"teacher": str(folder / "teacher.npy"), "batch_size": total}
    training = build_training(run, folder / "images", **OPTIONS | options)
    for number in bad:
        (folder / "images" / "train" / "one" / f"{number}.png").write_bytes(b"no image")
    allgather(True, "written")  # all workers read rank 0's images
    return training


def colours(views):
    """Return the images' numbers in views (B, 3, H, W) uint8, whose pixels they are."""
    assert (views == views[:, :1, :1, :1]).all()
    return views[:, 0, 0, 0].float()  # (B,)


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_targets_are_rows_of_the_images_read(run, tmp_path, accumulate, loaders):
    """The next image replaces the undecodable one, and has its own row."""
    training = build(run, tmp_path, bad=[2], accumulate=accumulate, workers=loaders)
    pairs, bad = [], []
    for step, (views, indices, undecodable) in enumerate(training.batches(Position(0, 0))):
        bad += undecodable
        seen = list(training.micro_batches(views, indices, Position(step, 0)))
        targets = torch.cat([training.distillation.targets(each)[0][0] for each in seen])  # (B, T)
        pairs.append((colours(views[0]), targets))
    every = allgather((pairs, bad), "targets")
    assert len(pairs) == STEPS and len({text for _, texts in every for text in texts}) == 1
    for own, _ in every:
        for numbers, targets in own:
            expected = np.stack([features(number) for number in numbers.tolist()])
            assert np.array_equal(targets, expected)


@pytest.mark.parametrize("distill", ["simreg", "similarity"])
def test_factor_is_measured_on_rows(run, tmp_path, distill):
    """It is the same on all workers, and depends on the rows."""
    factors = []
    for name, added in (("one", {}), ("other", {1: 1, 3: 1})):
        options = {"distill": [distill], "similarity_k": 8, "loss_share": 2.0}
        training = build(run, tmp_path / name, bad=[2], added=added, **options)
        training.distillation.before_epoch(0)
        factors.append(training.distillation.distillers[0].factor.item())
    every = allgather(factors, "factors")
    assert all(each == factors for each in every) and factors[0] != factors[1]


def test_digest_is_of_the_content(run, tmp_path, monkeypatch):
    """It is the same for any number of workers."""
    monkeypatch.setattr("job.distill.feature_file.BLOCK", 4 * T)  # bytes of a row
    digests = []
    for name, added in (("one", {}), ("same", {}), ("other", {B - 1: 1})):
        digests.append(build(run, tmp_path / name, added=added).distillation.digest)
    teacher = build(run, tmp_path / "last").distillation.networks.teacher
    found = find_rows(teacher.rows.path, teacher.images)
    together = check_rows(teacher.rows, found, teacher.images, run)
    every = allgather(digests, "digests")
    one, same, other = digests
    assert together == teacher.rows.check(0, 1)[0] and len(together) == comm.size() * B
    assert one == same != other and all(each == digests for each in every)


def test_values_that_are_not_finite_end_all_workers(run, tmp_path, monkeypatch):
    """The last worker checks them."""
    monkeypatch.setattr("job.distill.feature_file.BLOCK", 4 * T)  # bytes of a row
    last = comm.size() - 1  # of the rows, which are in reverse order
    with pytest.raises(RunError) as caught:
        build(run, tmp_path, added={comm.size() * B - 1 - last: np.nan})
    messages = allgather(str(caught.value), "messages")
    assert all(f": row {last}, of " in each and "not finite" in each for each in messages)


def test_another_copy_on_a_worker_ends_all(run, tmp_path):
    last = comm.rank() == comm.size() - 1
    with pytest.raises(RunError) as caught:
        build(run, tmp_path, added={1: 1.0} if last else {})
    messages = allgather(str(caught.value), "messages")
    expected = "other values on another worker; expected the same on all. Use a shared file system"
    assert all(expected in each for each in messages)
