"""Functions of reports that need no real run."""

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

from job.data.index import index
from job.metrics.log import Log
from job.show.read.runs import find_runs, unique_labels
from job.show.report import app, features, matching
from job.show.report.images import embeddings, neighbour_grid
from job.show.report.timing import refresh_seconds


def test_nearest_equals_a_slow_search():
    points = torch.nn.functional.normalize(
        torch.randn(30, 5, generator=torch.Generator().manual_seed(1)), dim=1
    )
    indices, cosines = features.nearest(points, [4, 9], 3)
    for query, others, values in zip([4, 9], indices, cosines, strict=True):
        slow = sorted(
            (-float(points[query] @ points[other]), other) for other in range(30) if other != query
        )[:3]
        assert [other for _, other in slow] == others.tolist()
        assert values == pytest.approx([-value for value, _ in slow], abs=1e-6)


@pytest.mark.slow
def test_pictures_of_unlabelled_images_have_a_remark(images, tmp_path):
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "val" / "0.tar", "w") as tar:
        for path in sorted((images / "val").glob("*/*.png")):
            tar.add(path, path.name)
    index(str(tmp_path), Log(speaks=False))
    sample, labelled = (features.read_sample((str(data),), 32) for data in (tmp_path, images))
    vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    for images, remark in ((sample, True), (labelled, False)):
        for picture in (
            embeddings([("run", vectors)], images, 0),
            neighbour_grid("run", "run", images, vectors),
        ):
            last = f"The images of {tmp_path}/val have no labels."
            assert picture.reading.endswith(last) == remark


def test_refreshes_are_separate_for_two_distillers(tmp_path):
    """Panels, columns and seconds."""
    refresh = {"kind": "refresh", "epoch": 1, "step": 0, "stage": 4}
    refreshes = [
        refresh | {"distiller": name, "changed": changed, "solving": 2.0}
        for name, changed in (("a", 0.1), ("b", 0.2))
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in refreshes)
    )
    [run] = find_runs([tmp_path])
    _, panels = matching.panels([run])
    titles = {key: axes.get_title() for key, axes in panels.items()}
    assert titles == {("a", 4): "a, stage 4", ("b", 4): "b, stage 4"}
    columns = [matching.of_stage(run, key, "epoch", "changed") for key in panels]
    assert columns == [[[1], [0.1]], [[1], [0.2]]]
    assert refresh_seconds(run.history) == 4


def test_labels_are_the_shortest_unique_paths(tmp_path):
    folders = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "other", tmp_path / "b/3"]
    assert unique_labels(folders) == ["a/run", "b/run", "other", "b/3"]


def test_report_without_runs_is_one_line_and_no_file(tmp_path, capsys):
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
    for command, text in zip(commands, expected, strict=True):
        with pytest.raises(SystemExit) as end:
            app.main([*map(str, command)])
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1
        assert line.startswith("error: ") and text in line
    assert not out.parent.exists()


def test_sample_of_flat_folder_or_list_has_no_labels(tmp_path):
    write_numbered(tmp_path / "numbered")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((tmp_path / "numbered").rglob("*.png")):
        path.rename(flat / path.name)
    names = sorted(path.name for path in flat.iterdir())
    (tmp_path / "list.txt").write_text("".join(f"flat/{name}\n" for name in names))
    for data in (flat, tmp_path / "list.txt"):
        sample = features.read_sample((str(data),), 32)
        assert sample.root == str(data)
        assert sample.remark == f" The images of {data} have no labels."
        assert {sample.classes[label] for label in sample.labels} == {"no label"}
        assert len(sample.views) == len(names)


def test_sample_has_images_of_all_folders(tmp_path, monkeypatch):
    """As k-NN, it prefers validation images. `digits` is a folder's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        features.digits, "write_digits", lambda folder: write_numbered(Path(folder))
    )
    for name in ("one", "two"):
        write_numbered(tmp_path / name)
        shutil.copytree(tmp_path / name / "train" / "0", tmp_path / name / "val" / "0")
    (tmp_path / "list.txt").write_text("one/train/0/00.png\n")
    options = {"image_size": 32, "data": "one", "more_data": ["two", "list.txt"]}
    data = tuple(features.checked(options)["data"])
    samples = [features.read_sample(data, 32)]
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name / "val")
        samples.append(features.read_sample((*data, *(["digits"] * (name == "two"))), 33))
        features.read_sample.cache_clear()
    assert [(sample.root, len(sample.views)) for sample in samples] == [
        ("one/val and two/val", 12),
        ("two/val", 6),
        ("one/train and 3 more", 37),
    ]
    assert features.read_sample(("digits", "one"), 32).root == "digits/train and one/train"


def test_teacher_has_the_image_size_of_the_run(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    options = {"teacher_arch": "timm/test_vit", "teacher_size": 64, "image_size": 32}
    student = features.Student(None, {}, options, "")
    net = features.read_teacher(student, str(tmp_path / "vit.pth"))
    assert net.input.size == 64 and net(torch.zeros(1, 3, 32, 32)).shape == (1, 128)


def test_teacher_is_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(*_, **__):
        pytest.fail("a download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    options = {"teacher_arch": "", "teacher_size": 0, "image_size": 32}
    student = features.Student(None, {}, options, "")
    assert "no file in the cache" in refused(features.read_teacher, student, "hub:resnet18")


def test_function_networks_are_refused_without_option(monkeypatch, tmp_path):
    """mgd-report has no option that names a network, so the error names none."""
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


def test_teacher_without_a_name_is_one_line_with_a_fix(tmp_path):
    """mgd-report has no option that names a network, so the fix names none."""
    torch.save({"blocks.0.attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "vit.pth")
    options = {"teacher_arch": "", "teacher_size": 0, "image_size": 32}
    student = features.Student(None, {}, options, "")
    message = refused(features.read_teacher, student, str(tmp_path / "vit.pth"))
    assert message.startswith(f"{tmp_path}/vit.pth holds no ResNet: ") and "--" not in message
    fix = "use the file that the run used, or one whose arch names its network"
    assert message.endswith(f": {fix}")
