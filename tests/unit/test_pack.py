"""job.pack: shards, resuming, options and errors."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import webdataset

import job.files
import job.pack
from job.data.folders import scan
from job.pack import main
from runs import errors_of

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp --aug-plus".split()
SMALL += "--knn-every 1 --save-every 2steps --keep 9".split()


def tree(folder):
    """Return {path: bytes} of all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def packed(data, out, *options):
    main([str(data), str(out), *map(str, options)])
    return out


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    """The images of a folder, in shards of 7."""
    return packed(images, tmp_path_factory.mktemp("packed") / "out", "--shard-images", 7)


def test_pack_keeps_every_image_once(images, shards):
    for split in ("train", "val"):
        folder, sharded = scan(str(images), split), scan(str(shards), split)
        expected = {
            folder.names[n]: (int(folder.labels[n]), folder.content(n)) for n in range(len(folder))
        }
        assert sharded.classes == folder.classes
        assert len(sharded) == len(folder)
        assert {
            sharded.names[n]: (int(sharded.labels[n]), sharded.content(n))
            for n in range(len(sharded))
        } == expected
    assert sorted(path.name for path in (shards / "train").iterdir()) == [
        "index.npz",
        *(f"train-{n:06d}.tar" for n in range(8)),
    ]
    assert sorted(path.name for path in shards.iterdir()) == ["train", "val"]


def test_pack_accepts_a_folder_without_train(images, shards, tmp_path):
    out = packed(images / "train", tmp_path / "out", "--shard-images", 7)
    assert [path.name for path in out.iterdir()] == ["train"]
    assert tree(out / "train") == tree(shards / "train")


def test_pack_mixes_classes_in_shards(images, shards):
    labels = scan(str(shards), "train").labels[:49].reshape(7, 7)
    assert all(0 < row.sum() < 7 for row in labels)


def test_pack_is_read_by_webdataset(images, shards):
    samples = {}
    for path in sorted(map(str, (shards / "train").glob("*.tar"))):
        for sample in webdataset.WebDataset(path, shardshuffle=False, empty_check=False).decode(
            "rgb8"
        ):
            assert sample["__key__"] == f"{len(samples):09d}"
            samples[sample["json"]["path"]] = sample["cls"], sample["png"]
    folder = scan(str(images), "train")
    assert len(samples) == len(folder) == 50
    for number in range(50):
        label, pixels = samples[folder.names[number]]
        expected, truth, _ = folder.read(number)
        assert np.array_equal(pixels, expected)
        assert label == truth


def test_pack_logs_files_left_out(images, shards, tmp_path, capfd):
    """A companion file of macOS, a notebook's copy, a photograph that PIL cannot read."""
    data = tmp_path / "in"
    shutil.copytree(images, data)
    (data / "train" / "class0" / "._0.png").write_bytes(
        bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4000)
    )
    shutil.copytree(data / "val" / "class1", data / "val" / ".ipynb_checkpoints")
    shutil.copytree(data / "val" / "class1", data / "val" / "class1" / ".ipynb_checkpoints")
    (data / "val" / "class1" / "IMG_1.CR3").write_bytes(b"x")
    out = packed(data, tmp_path / "out", "--shard-images", 7)
    lines = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
    assert lines == [
        f"left out 1 of 51 files in {data}/train: "
        "1 hidden or of the system (such as class0/._0.png)",
        f"left out 3 of 12 files in {data}/val: "
        "2 hidden or of the system (such as .ipynb_checkpoints), 1 .cr3 (such as class1/IMG_1.CR3)",
    ]
    assert tree(out) == tree(shards)


def test_pack_gives_the_same_bytes_later(images, shards, tmp_path, monkeypatch):
    """An index written from the shards also equals packing's own."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    again = packed(images, tmp_path / "again", "--shard-images", 7)
    assert tree(again) == tree(shards)
    for path in again.glob("*/index.npz"):
        path.unlink()
    main(["--index", str(again)])
    assert tree(again) == tree(shards)


def test_pack_seed_changes_the_order(images, shards, tmp_path):
    again = packed(images, tmp_path / "again", "--shard-images", 7, "--seed", 1)
    first, second = (list(scan(str(folder), "train").names) for folder in (shards, again))
    assert first != second
    assert sorted(first) == sorted(second)


def test_pack_resumes_from_complete_shards(images, shards, tmp_path, monkeypatch):
    """One packing was killed after some shards, one before the last rename."""
    content = fingerprint(images, tmp_path, monkeypatch)
    for left in (3, 8):
        part = tmp_path / f"{left}.part"
        with pytest.raises(SystemExit):
            main([str(images), str(tmp_path / str(left)), "--shard-images", "0"])
        assert not part.exists()
        shutil.copytree(shards, part)
        (part / "packing.sha256").write_bytes(content)
        for path in sorted((part / "train").glob("*.tar"))[left:]:
            path.rename(f"{path}.new")
            os.truncate(f"{path}.new", 700)
        before = {path: path.stat().st_mtime_ns for path in part.glob("*/*.tar")}
        out = packed(images, tmp_path / str(left), "--shard-images", 7)
        assert tree(out) == tree(shards)
        assert {
            path: (out / path.relative_to(part)).stat().st_mtime_ns for path in before
        } == before


def fingerprint(images, tmp_path, monkeypatch):
    """Return the fingerprint in the folder of an interrupted packing in shards of 7."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="9"):
        patch.setattr(job.pack, "pack_split", lambda *_: sys.exit(9))
        packed(images, tmp_path / "fingerprint", "--shard-images", 7)
    content = (tmp_path / "fingerprint.part" / "packing.sha256").read_bytes()
    shutil.rmtree(tmp_path / "fingerprint.part")
    return content


@pytest.mark.slow
@pytest.mark.short
def test_pack_killed_resumes_to_the_same_bytes(images, shards, tmp_path):
    """SIGKILL at several moments of a packing whose reads are slow."""
    slow = "import job.pack, time; from job.data.folders import ImageFolder as F\n"
    slow += "read, job.pack.READERS = F.content, 1\n"
    slow += "F.content = lambda *given: (time.sleep(0.02), read(*given))[1]; job.pack.main()"
    command = [
        sys.executable,
        "-c",
        slow,
        str(images),
        str(tmp_path / "out"),
        "--shard-images",
        "7",
    ]
    for count in (0, 2, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("out.part/train/*.tar"))) < count or not list(
            tmp_path.glob("out.part/train/*.new")
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
    assert tree(packed(images, tmp_path / "out", "--shard-images", 7)) == tree(shards)
    assert not (tmp_path / "out.part").exists()


def test_pack_progress_is_a_bounded_number_of_lines(tmp_path, capfd):
    """Few images give a line each, many about a hundred."""
    for number in range(350):
        path = tmp_path / "in" / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    packed(tmp_path / "in", tmp_path / "out")
    *lines, summary, advice = capfd.readouterr().out.splitlines()
    assert 50 <= len(lines) <= 101
    assert lines[-1].startswith("packing train-000000.tar: 350 of 350 images")
    assert "350 train images in 1 shards" in summary
    assert advice.endswith(f"mgd-train {tmp_path / 'out'}")


# Errors.


@pytest.fixture(scope="module")
def errors(images, shards, tmp_path_factory):
    """The error line of each of WRONG, by name."""
    base = tmp_path_factory.mktemp("wrong")
    for name in ("old", "unknown.part"):
        (base / name).mkdir()
    (base / "unknown.part" / "something").write_text("x")
    shutil.copytree(shards, base / "other.part")
    (base / "other.part" / "packing.sha256").write_text("of other images")
    damage = {
        "cut": lambda path: os.truncate(path, 700),
        "compressed": lambda path: subprocess.run(["gzip", path]),
    }
    damage["no tar"] = lambda path: path.write_text("x")
    for name, harm in damage.items():
        shutil.copytree(shards, base / name)
        harm(base / name / "train" / "train-000003.tar")
    (base / "compressed" / "train" / "train-000003.tar.gz").rename(
        base / "compressed" / "train" / "train-000003.tar"
    )
    (base / "no images" / "train").mkdir(parents=True)
    with webdataset.TarWriter(str(base / "no images" / "train" / "0.tar")) as writer:
        writer.write({"__key__": "a", "cr3": b"x"})
    (base / "empty" / "train" / "a").mkdir(parents=True)
    commands = {
        name: [str(each).format(images=images, shards=shards, base=base) for each in argv]
        for name, (argv, _) in WRONG.items()
    }
    before = sorted(tree(base))
    lines = dict(zip(commands, errors_of("job.pack", list(commands.values())), strict=True))
    assert sorted(tree(base)) == before  # no file is written
    return lines


WRONG = {
    "no words": ([], "the following arguments are required: DIR"),
    "no OUT": (["{images}"], "OUT: missing; expected a folder to write"),
    "OUT with --index": (["--index", "{shards}", "{base}/x"], "leave it out"),
    "unknown option": (["{images}", "{base}/x", "--shards", "3"], "unrecognized arguments"),
    "no images in a shard": (
        ["{images}", "{base}/x", "--shard-images", "0"],
        "--shard-images 0: expected at least 1",
    ),
    "no number": (["{images}", "{base}/x", "--seed", "a"], "--seed 'a': expected an integer"),
    "OUT exists": (
        ["{images}", "{base}/old"],
        "old: exists; expected a new folder. Name another one, or remove it",
    ),
    "other packing": (
        ["{images}", "{base}/other"],
        "other.part: from a packing with other images or options",
    ),
    "other options": (
        ["{images}", "{base}/unknown"],
        "unknown.part: from a packing with other images or options",
    ),
    "no parent": (
        ["{images}", "/proc/x"],
        "cannot make the folder /proc/x.part: No such file or directory. Name another OUT",
    ),
    "no folder": (["{base}/none", "{base}/x"], "{base}/none: no such folder"),
    "no images": (["{base}/empty", "{base}/x"], "no images below"),
    "packed": (["{shards}", "{base}/x"], "already packed. Train from"),
    "no shards": (["--index", "{images}"], "no shards in"),
    "cut": (["--index", "{base}/cut"], "train-000003.tar: incomplete or"),
    "compressed": (
        ["--index", "{base}/compressed"],
        "train-000003.tar: incomplete or compressed tar file",
    ),
    "no tar": (["--index", "{base}/no tar"], "train-000003.tar: incomplete or compressed tar file"),
    "other images": (
        ["--index", "{base}/no images"],
        "left out 1 of 1 files in {base}/no images/train: 1 .cr3 (such as a.cr3)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_pack_mistakes_are_one_line(errors, name):
    expected = WRONG[name][1]
    assert expected.partition("{")[0] in errors[name]


def test_pack_unreadable_file_keeps_shards(images, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(job.files, "PAUSES", (0,))
    data = tmp_path / "in"
    shutil.copytree(images, data)
    names = sorted((data / "train").glob("*/*.png"))
    (data / "copy").write_bytes(names[40].read_bytes())
    names[40].unlink()
    names[40].symlink_to("nowhere")
    with pytest.raises(SystemExit) as caught:
        packed(data, tmp_path / "out", "--shard-images", 1)
    lines = capfd.readouterr().err.splitlines()
    assert caught.value.code == 1
    problem = f"cannot read {names[40]}: No such file or directory"
    assert lines[0] == f"warning: {problem}; next try in 0 s"
    assert lines[1:] == [
        f"error: {problem}, tried 2 times in 0 s. Check its file system and permissions"
    ]
    kept = len(list((tmp_path / "out.part" / "train").glob("*.tar")))
    names[40].unlink()
    names[40].write_bytes((data / "copy").read_bytes())
    packed(data, tmp_path / "out", "--shard-images", 1)
    assert f" {kept + 1} of 59 images" in capfd.readouterr().out.splitlines()[0]


def test_pack_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(
        name in text
        for name in ("DIR", "OUT", "--index", "--shard-images", "--seed", "default: 1000")
    )


@pytest.mark.slow
def test_pack_errors_are_a_run_s(shards, tmp_path):
    """A damaged index and a missing shard are also one line of job.train."""
    for name in ("index", "shard"):
        shutil.copytree(shards, tmp_path / name)
    (tmp_path / "index" / "train" / "index.npz").write_bytes(b"x")
    (tmp_path / "shard" / "train" / "train-000001.tar").unlink()
    commands = [[tmp_path / name, *SMALL, "--out", tmp_path / "run"] for name in ("index", "shard")]
    damaged, missing = errors_of("job.train", commands)
    assert f"{tmp_path}/index/train/index.npz: incomplete index" in damaged
    assert f"{tmp_path}/shard/train/train-000001.tar is missing" in missing
