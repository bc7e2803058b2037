"""Parts of reports that need no run."""

import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from batches import write_numbered
from errors import refused
from runs import errors_of

from job.data.index import index
from job.metrics.log import Log
from job.show.read.runs import find_runs, tell_apart
from job.show.report import features, matching
from job.show.report.images import embeddings, neighbour_grid
from job.show.report.timing import refresh_seconds


def test_neighbours_are_the_nearest_others():
    points = torch.nn.functional.normalize(
        torch.randn(30, 5, generator=torch.Generator().manual_seed(1)), dim=1
    )
    places, cosines = features.nearest(points, [4, 9], 3)
    for query, found, near in zip([4, 9], places, cosines, strict=True):
        slow = sorted(
            (-float(points[query] @ points[other]), other) for other in range(30) if other != query
        )[:3]
        assert [other for _, other in slow] == found.tolist()
        assert near == pytest.approx([-value for value, _ in slow], abs=1e-6)


@pytest.mark.slow
def test_pictures_of_images_without_labels_say_so(images, tmp_path):
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "val" / "0.tar", "w") as tar:
        for path in sorted((images / "val").glob("*/*.png")):
            tar.add(path, path.name)
    index(str(tmp_path), Log(speaks=False))
    sample, labelled = (features.read_sample((str(data),), 32) for data in (tmp_path, images))
    found = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    for some, said in ((sample, True), (labelled, False)):
        for picture in (
            embeddings([("run", found)], some, 0),
            neighbour_grid("run", "run", some, found),
        ):
            assert picture.reading.endswith(f"The images of {tmp_path}/val have no labels.") == said


def test_two_distillers_have_refreshes_of_their_own(tmp_path):
    """Panels, columns and seconds."""
    place = {"kind": "refresh", "epoch": 1, "step": 0, "stage": 4}
    refreshes = [
        place | {"distiller": name, "changed": changed, "solving": 2.0}
        for name, changed in (("a", 0.1), ("b", 0.2))
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in refreshes)
    )
    [run] = find_runs([tmp_path])
    _, found = matching.panels([run])
    assert {key: axes.get_title() for key, axes in found.items()} == {
        ("a", 4): "a, stage 4",
        ("b", 4): "b, stage 4",
    }
    assert [matching.of_stage(run, key, "epoch", "changed") for key in found] == [
        [[1], [0.1]],
        [[1], [0.2]],
    ]
    assert refresh_seconds(run.history) == 4


def test_names_are_as_long_as_they_must_be(tmp_path):
    folders = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "other", tmp_path / "b/3"]
    assert tell_apart(folders) == ["a/run", "b/run", "other", "b/3"]


@pytest.mark.slow
def test_what_holds_no_run_ends_with_one_line_and_no_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "log.txt"):
        (tmp_path / "damaged" / name).write_bytes(b"\x00\xff\x00" * 50)
    out = tmp_path / "out" / "report.html"
    commands = [[tmp_path / name, "--out", out] for name in ("empty", "damaged", "missing")]
    commands += [[tmp_path / "empty", "--out", tmp_path], ["--out", out]]
    expected = [
        "empty holds no run",
        "damaged holds no run",
        "no such file or folder",
        "expected a file",
        "required: RUN",
    ]
    for said, part in zip(errors_of("job.show.report.app", commands), expected, strict=True):
        assert part in said
    assert not out.parent.exists()


def test_images_in_no_folder_and_of_a_list_are_shown_without_labels(tmp_path):
    write_numbered(tmp_path / "numbered")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((tmp_path / "numbered").rglob("*.png")):
        path.rename(flat / path.name)
    names = sorted(path.name for path in flat.iterdir())
    (tmp_path / "list.txt").write_text("".join(f"flat/{name}\n" for name in names))
    for data in (flat, tmp_path / "list.txt"):
        sample = features.read_sample((str(data),), 32)
        assert (
            sample.root == str(data) and sample.remark == f" The images of {data} have no labels."
        )
        assert {sample.classes[label] for label in sample.labels} == {"no label"} and len(
            sample.views
        ) == len(names)


def test_images_of_all_folders_of_a_run_are_shown(tmp_path, monkeypatch):
    """Validation images if some have them, as k-NN has; the word digits is a folder among them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        features.digits, "write_digits", lambda folder: write_numbered(Path(folder))
    )
    for name in ("one", "two"):
        write_numbered(tmp_path / name)
        shutil.copytree(tmp_path / name / "train" / "0", tmp_path / name / "val" / "0")
    (tmp_path / "list.txt").write_text("one/train/0/00.png\n")
    options = {"image_size": 32, "data": "one", "more_data": ["two", "list.txt"]}
    places = tuple(features.checked(options)["places"])
    found = [features.read_sample(places, 32)]
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name / "val")
        found.append(features.read_sample((*places, *(["digits"] * (name == "two"))), 33))
        features.read_sample.cache_clear()
    roots = ["one/val and two/val", "two/val", "one/train and 3 more"]
    assert [(sample.root, len(sample.views)) for sample in found] == list(
        zip(roots, [12, 6, 37], strict=True)
    )
    assert features.read_sample(("digits", "one"), 32).root == "digits/train and one/train"


def test_a_report_shows_the_teacher_at_the_size_of_the_run(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    options = {"teacher_arch": "timm/test_vit", "teacher_size": 64, "image_size": 32}
    student = features.Student(None, {}, options, "")
    net = features.read_teacher(student, str(tmp_path / "vit.pth"))
    assert net.input.size == 64 and net(torch.zeros(1, 3, 32, 32)).shape == (1, 128)


def test_a_report_downloads_no_teacher(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(*_, **__):
        pytest.fail("a download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    options = {"teacher_arch": "", "teacher_size": 0, "image_size": 32}
    student = features.Student(None, {}, options, "")
    assert "no file in the cache" in refused(features.read_teacher, student, "hub:resnet18")


def test_a_report_runs_no_function_and_asks_for_no_option(monkeypatch, tmp_path):
    """It has no option that names a network."""
    content = {"arch": "mine:Net", "format": 3, "config": {}, "state_dict": {}, "mgd": {}}
    path = tmp_path / "checkpoint_0001_000000.pth.tar"
    torch.save(content, path)
    options = {"teacher_arch": "", "teacher_size": 0, "image_size": 32}
    student = features.Student(None, {}, options, "")
    message = refused(features.read_teacher, student, str(path))
    assert "network of the function mine:Net" in message and "--" not in message
    history = SimpleNamespace(checkpoints=[path], folder=tmp_path, options={})
    monkeypatch.setattr(features, "load", lambda path: content)
    message = refused(features.newest_student, history)
    assert "network of the function mine:Net" in message and "--" not in message


def test_a_teacher_s_file_without_a_name_is_one_line_with_what_to_bring(tmp_path):
    """mgd-report has no option that names a network."""
    torch.save({"blocks.0.attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "vit.pth")
    options = {"teacher_arch": "", "teacher_size": 0, "image_size": 32}
    student = features.Student(None, {}, options, "")
    message = refused(features.read_teacher, student, str(tmp_path / "vit.pth"))
    assert message.startswith(f"{tmp_path}/vit.pth holds no ResNet: ") and "--" not in message
    fix = "use the file that the run had, or one that names its network as its arch"
    assert message.endswith(f": {fix}")
