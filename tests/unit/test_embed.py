"""job.embed on one worker: files, options and errors."""

import errno
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from job import cli
from job import embed as module
from job.checkpoints.foreign import read_backbone
from job.data.augment import CentreView, normalize
from job.data.folders import scan
from job.data.image_files import ImageList
from job.data.splits import Splits
from job.embed import EmbedConfig, main
from job.errors import RunError
from job.evaluate import features
from job.metrics.log import Log
from job.networks import build_resnet
from job.pack import Options, pack
from errors import refused
from runs import write_images, write_teacher

ROOT = Path(__file__).parents[2]
SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "net.pth.tar"
    return write_teacher(path, "resnet18", stem="small", width=16)


@pytest.fixture
def images(tmp_path):
    """A folder of 59 images in two splits, of which two cannot be decoded."""
    folder = write_images(tmp_path / "images")
    for name in ("train/class0/10.png", "val/class1/51.png"):
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.fixture
def embed(images, checkpoint, tmp_path, monkeypatch, capsys):
    """A function that runs the program; it returns its exit code and what it has printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(features, "GROUP", 8)
    monkeypatch.chdir(tmp_path)

    def run(*options, out="out.npy", data=images):
        argv = [
            data,
            "--pretrained",
            checkpoint,
            "--image-size",
            SIZE,
            "-j",
            0,
            "--out",
            out,
            *options,
        ]
        code = 0
        try:
            main([str(argument) for argument in argv])
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())

    return run


def expected(images, checkpoint):
    """The path and the features of each image, one image after the other."""
    weights = read_backbone(str(checkpoint))
    net = build_resnet("resnet18", stem="small", width=16)
    net.fc = torch.nn.Identity()
    net.load_state_dict(weights.state)
    found = {}
    for split in ("train", "val"):
        some = scan(str(images), split)
        for index in range(len(some)):
            pixels, _, bad = some.read(index)
            if not bad:
                with torch.no_grad():
                    row = net.eval()(normalize(CentreView(SIZE)(pixels)[None]))[0]
                found[f"{split}/{some.names[index]}"] = row
    return found


@pytest.mark.slow
def test_each_decodable_image_has_its_features_and_its_path(embed, images, checkpoint, tmp_path):
    code, said = embed()
    assert code == 0, said
    about = json.loads((tmp_path / "out.json").read_text())
    rows = expected(images, checkpoint)
    assert about["paths"] == list(rows)
    found = torch.from_numpy(np.load("out.npy"))
    torch.testing.assert_close(found, torch.stack(list(rows.values())), rtol=1e-4, atol=1e-5)
    text = "no image of a known format"
    assert about["undecodable"] == [["train/class0/10.png", text], ["val/class1/51.png", text]]
    assert (about["checkpoint"], about["image_size"], about["images"], about["epoch"]) == (
        "net.pth.tar",
        SIZE,
        59,
        200,
    )
    assert f"cannot decode {images}/train/class0/10.png: {text}; it has no row" in said
    assert "wrote out.npy: 57 x 128 float32; 2 undecodable images have no row" in said
    assert not (tmp_path / "out.npy.part").exists()


@pytest.mark.slow
def test_parquet_has_the_same_features(embed):
    import pyarrow.parquet

    assert [embed(out=out)[0] for out in ("out.npy", "out.parquet")] == [0, 0]
    table = pyarrow.parquet.read_table("out.parquet")
    assert table["path"].to_pylist() == json.loads(Path("out.json").read_text())["paths"]
    found = np.array(table["features"].to_pylist(), dtype=np.float32)
    assert found.tobytes() == np.load("out.npy").tobytes()


@pytest.mark.slow
def test_an_image_s_features_do_not_depend_on_the_other_images(embed, images):
    """Its group, and its position there, are others after some are removed."""
    embed()
    paths = json.loads(Path("out.json").read_text())["paths"]
    before = dict(zip(paths, np.load("out.npy"), strict=True))
    for path in sorted(images.rglob("*.png"))[::3]:
        path.unlink()
    embed("--force")
    paths = json.loads(Path("out.json").read_text())["paths"]
    assert 30 < len(paths) < 45
    for path, row in zip(paths, np.load("out.npy"), strict=True):
        np.testing.assert_allclose(row, before[path], rtol=1e-4, atol=1e-5)


def interrupted(monkeypatch, after):
    """Let the program fail when it appends group number `after`."""
    append = module.Rows.append

    def failing(rows, *group):
        if len(rows.journal) == after:
            raise KeyboardInterrupt
        append(rows, *group)

    monkeypatch.setattr(module.Rows, "append", failing)


@pytest.mark.slow
@pytest.mark.parametrize(("after", "out"), [(0, "out.npy"), (3, "out.parquet"), (7, "out.npy")])
def test_a_killed_program_resumes_to_the_same_bytes(embed, tmp_path, monkeypatch, after, out):
    """No group is computed again. The eighth is the first of val."""
    whole = f"whole{Path(out).suffix}"
    assert embed(out=whole)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, after)
        embed(out=out)
    assert not Path(out).exists()
    passes = []
    forward = module.Pass.forward
    with monkeypatch.context() as patch:
        patch.setattr(module.Pass, "width", 128)
        patch.setattr(
            module.Pass,
            "forward",
            lambda self, pixels: passes.append(len(pixels)) or forward(self, pixels),
        )
        code, said = embed(out=out)
    assert code == 0, said
    assert passes == [8, 8, 8, 8, 8, 8, 2, 8, 1][after:]
    assert (f"resuming: {min(8 * after, 50)} of 59 images are done" in said) == (after > 0)
    assert Path(out).read_bytes() == Path(whole).read_bytes()
    if out == "out.npy":
        assert Path("out.json").read_bytes() == Path("whole.json").read_bytes()


@pytest.mark.slow
def test_undecodable_images_of_a_killed_program_count(embed, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 3)
        embed()
    code, said = embed("--max-bad-images", 0)
    assert (code, said.count("error: ")) == (2, 1)
    assert "1 of 59 images cannot be decoded, and --max-bad-images is 0; the first: " in said
    code, said = embed("--max-bad-images", 1)
    assert code == 2 and "2 of 59 images cannot be decoded" in said
    assert embed("--max-bad-images", 2)[0] == 0


def test_undecodable_images_of_a_killed_program_that_had_computed_all_count(embed, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "finish", killed)
        embed()
    code, said = embed("--max-bad-images", 1)
    assert code == 2 and "2 of 59 images cannot be decoded" in said
    assert not Path("out.npy").exists()


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_the_same_command_resumes_after_a_disk_was_full_at_the_end(embed, monkeypatch, out):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.Rows, "groups", full)
        code, said = embed(out=out)
    assert code == 1 and f"cannot write {out}: No space left on device" in said
    code, said = embed(out=out)
    assert code == 0 and "resuming: 59 of 59" in said


def test_images_of_which_none_can_be_decoded_are_one_line(embed, images):
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    code, said = embed()
    assert code == 2 and "59 of 59 images cannot be decoded" in said
    assert not Path("out.npy").exists()


def test_undecodable_images_of_a_list_are_logged_under_their_own_paths(embed, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "1.png").write_bytes(b"no image")
    (tmp_path / "sub" / "list.txt").write_text(f"1.png\n{tmp_path}/sub/1.png\n")
    code, said = embed(data="sub/list.txt")
    paths = re.findall("cannot decode (.*): no image of a known format; it has no row", said)
    assert paths == ["sub/1.png", f"{tmp_path}/sub/1.png"]
    assert code == 2 and said.endswith("the first: sub/1.png\n")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["flat", "list.txt", "packed"])
def test_a_flat_folder_a_list_and_shards_have_the_rows_of_a_folder(embed, images, tmp_path, data):
    """Under the paths that the folder, the list or the shards have."""
    embed(data=images)
    paths = json.loads(Path("out.json").read_text())["paths"]
    rows = dict(zip(paths, np.load("out.npy"), strict=True))
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(paths):
        shutil.copy(images / path, tmp_path / "flat" / f"{number:02d}.png")
    (tmp_path / "list.txt").write_text("".join(f"images/{path}\n" for path in paths[::-1]))
    pack(str(images), str(tmp_path / "packed"), Options(shard_images=20), Log(speaks=False))
    code, said = embed("--force", data=tmp_path / data)
    assert code == 0, said
    names = {
        "flat": lambda path: paths[int(path[:2])],
        "list.txt": lambda path: path.removeprefix("images/"),
        "packed": lambda path: path,
    }
    found = json.loads(Path("out.json").read_text())["paths"]
    shown = [names[data](path) for path in found]
    assert sorted(shown) == sorted(paths) and (data != "list.txt" or shown == paths[::-1])
    for path, row in zip(shown, np.load("out.npy"), strict=True):
        np.testing.assert_allclose(row, rows[path], rtol=1e-4, atol=1e-5)


def test_a_folder_of_other_images_is_not_resumed(embed, images, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 2)
        embed()
    (images / "train" / "class1" / "1.png").rename(images / "train" / "class1" / "1b.png")
    code, said = embed()
    assert code == 2 and "error: out.npy.part: features with another set of images" in said


def test_another_folder_with_the_same_names_is_not_resumed(embed, images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 2)
        embed()
    shutil.copytree(images, tmp_path / "other")
    code, said = embed(data=tmp_path / "other")
    assert code == 2 and "error: out.npy.part: features with another DIR" in said
    assert embed()[0] == 0
    assert str(tmp_path) not in Path("out.json").read_text()


def test_the_image_size_is_by_default_that_of_the_checkpoint(embed, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"format": 3, "config": {"image_size": 24}}, tmp_path / "run.pth.tar")
    for path, size in ((checkpoint, 224), (tmp_path / "run.pth.tar", 24)):
        weights = read_backbone(str(path))
        config = EmbedConfig(data="DIR", pretrained=str(path), out="x.npy")
        assert module.complete(config, weights).image_size == size
    weights.meta["config"]["image_size"] = "wide"
    with pytest.raises(RunError, match="--image-size wide"):
        module.complete(config, weights)


def test_features_that_are_not_finite_are_one_line(embed, monkeypatch):
    forward = module.Pass.forward
    monkeypatch.setattr(module.Pass, "forward", lambda self, pixels: forward(self, pixels) / 0)
    code, said = embed()
    assert code == 1 and "features that are not finite" in said
    assert not Path("out.npy").exists()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["DIR: missing"]),
        ("{images}", ["--pretrained: missing", "--help"]),
        ("{images} --pretrained {net}", ["--out: missing", ".npy or .parquet"]),
        ("{images} --pretrained {net} --out f.csv", ["--out f.csv", ".npy or .parquet"]),
        ("{images} --pretrained nowhere --out f.npy", ["nowhere", "no such file"]),
        ("nowhere --pretrained {net} --out f.npy", ["nowhere"]),
        ("{images} --pretrained {net} --out f.npy -a resnet34", ["resnet34", "--arch"]),
        ("{images} other --pretrained {net} --out f.npy", ["DIR", "images other", "expected one"]),
        ("{images} --more-data other --pretrained {net} --out f.npy", ["--more-data"]),
        ("{images} --pretrained {net} --out f.npy --image-size 5", ["--image-size 5", "8 to 4096"]),
        (
            "{images} --pretrained {net} --out f.npy --image-sze 8",
            ["--image-sze", "did you mean --image-size"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    images, checkpoint, tmp_path, monkeypatch, capsys, line, parts,
):  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line.format(images=images, net=checkpoint)))
    said = capsys.readouterr().err
    assert (caught.value.code, said.count("\n"), said[:7]) == (2, 1, "error: ")
    assert all(part in said for part in parts)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_the_help_shows_one_folder(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "job.embed DIR [options]" in said and "--more-data" not in said


def test_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["~/d", "--pretrained", "~/c", "--out", "~/o.npy"]
    config, _ = cli.read("job.embed", EmbedConfig, argv)
    assert (config.data, config.pretrained, config.out) == (
        "/home/me/d",
        "/home/me/c",
        "/home/me/o.npy",
    )


@pytest.mark.parametrize("page", ["README.md", "job/evaluate/README.md"])
def test_the_commands_of_the_pages_are_options(page):
    text = (ROOT / page).read_text()
    commands = re.findall(r"^ {4}(.*job\.embed .*|.*mgd-embed .*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        start = next(n for n, word in enumerate(words) if word in ("job.embed", "mgd-embed"))
        config, given = cli.read("job.embed", EmbedConfig, words[start + 1 :])
        assert {"data", "pretrained", "out"} <= given
        assert module.ending(config.out) in module.FORMATS


@pytest.mark.parametrize(
    ("lines", "limit", "count"), [("aabc", 1, None), ("aabc", 0, 1), ("aa", 9, 2)]
)
def test_a_file_that_a_list_names_twice_counts_once(lines, limit, count):
    """a is undecodable; if no image is left, the program ends."""
    splits = Splits({"": ImageList("list.txt", list(lines), 0)})
    config = EmbedConfig(pretrained="net", out="f.npy", max_bad_images=limit)
    bad = dict.fromkeys((0, 1), "cut short")
    if count is None:
        module.check_bad(bad, splits, config)
    else:
        text = f"{count} of {len(lines)} images cannot be decoded, and --max-bad-images is {limit}"
        assert refused(module.check_bad, bad, splits, config) == f"{text}; the first: a"
