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
    """A folder of 59 images in two splits, two of them undecodable."""
    folder = write_images(tmp_path / "images")
    for name in ("train/class0/10.png", "val/class1/51.png"):
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.fixture
def embed(images, checkpoint, tmp_path, monkeypatch, capsys):
    """A function that runs the program and returns its exit code and output."""
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
    """Return the path and the features of each image, computed one by one."""
    weights = read_backbone(str(checkpoint))
    net = build_resnet("resnet18", stem="small", width=16)
    net.fc = torch.nn.Identity()
    net.load_state_dict(weights.state)
    features_of = {}
    for split in ("train", "val"):
        some = scan(str(images), split)
        for index in range(len(some)):
            pixels, _, bad = some.read(index)
            if not bad:
                with torch.no_grad():
                    row = net.eval()(normalize(CentreView(SIZE)(pixels)[None]))[0]
                features_of[f"{split}/{some.names[index]}"] = row
    return features_of


@pytest.mark.slow
@pytest.mark.short
def test_embed_writes_features_and_paths(embed, images, checkpoint, tmp_path):
    code, output = embed()
    assert code == 0, output
    about = json.loads((tmp_path / "out.json").read_text())
    rows = expected(images, checkpoint)
    assert about["paths"] == list(rows)
    actual = torch.from_numpy(np.load("out.npy"))
    torch.testing.assert_close(actual, torch.stack(list(rows.values())), rtol=1e-4, atol=1e-5)
    text = "no image of a known format"
    assert about["undecodable"] == [["train/class0/10.png", text], ["val/class1/51.png", text]]
    assert (about["checkpoint"], about["image_size"], about["images"], about["epoch"]) == (
        "net.pth.tar",
        SIZE,
        59,
        200,
    )
    assert f"cannot decode {images}/train/class0/10.png: {text}; it has no row" in output
    assert "wrote out.npy: 57 x 128 float32; 2 undecodable images have no row" in output
    assert not (tmp_path / "out.npy.part").exists()


@pytest.mark.slow
def test_embed_parquet_equals_npy(embed):
    import pyarrow.parquet

    assert [embed(out=out)[0] for out in ("out.npy", "out.parquet")] == [0, 0]
    table = pyarrow.parquet.read_table("out.parquet")
    assert table["path"].to_pylist() == json.loads(Path("out.json").read_text())["paths"]
    actual = np.array(table["features"].to_pylist(), dtype=np.float32)
    assert actual.tobytes() == np.load("out.npy").tobytes()


@pytest.mark.slow
def test_embed_features_ignore_other_images(embed, images):
    """An image's group, and its position there, change after some are removed."""
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
    """Interrupt the program when it appends group number `after`."""
    append = module.Rows.append

    def failing(rows, *group):
        if len(rows.journal) == after:
            raise KeyboardInterrupt
        append(rows, *group)

    monkeypatch.setattr(module.Rows, "append", failing)


@pytest.mark.slow
@pytest.mark.parametrize(("after", "out"), [(0, "out.npy"), (3, "out.parquet"), (7, "out.npy")])
def test_embed_resumes_to_the_same_bytes(embed, tmp_path, monkeypatch, after, out):
    """No group is computed again. The eighth is the first of val."""
    full = f"full{Path(out).suffix}"
    assert embed(out=full)[0] == 0
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
        code, output = embed(out=out)
    assert code == 0, output
    assert passes == [8, 8, 8, 8, 8, 8, 2, 8, 1][after:]
    assert (f"resuming: {min(8 * after, 50)} of 59 images are done" in output) == (after > 0)
    assert Path(out).read_bytes() == Path(full).read_bytes()
    if out == "out.npy":
        assert Path("out.json").read_bytes() == Path("full.json").read_bytes()


@pytest.mark.slow
def test_embed_resume_counts_undecodable_images(embed, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 3)
        embed()
    code, output = embed("--max-bad-images", 0)
    assert (code, output.count("error: ")) == (2, 1)
    assert "1 of 59 images cannot be decoded, and --max-bad-images is 0; the first: " in output
    code, output = embed("--max-bad-images", 1)
    assert code == 2 and "2 of 59 images cannot be decoded" in output
    assert embed("--max-bad-images", 2)[0] == 0


def test_embed_resume_at_the_end_counts_them(embed, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "finish", killed)
        embed()
    code, output = embed("--max-bad-images", 1)
    assert code == 2 and "2 of 59 images cannot be decoded" in output
    assert not Path("out.npy").exists()


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_embed_resumes_after_a_full_disk(embed, monkeypatch, out):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.Rows, "groups", full)
        code, output = embed(out=out)
    assert code == 1 and f"cannot write {out}: No space left on device" in output
    code, output = embed(out=out)
    assert code == 0 and "resuming: 59 of 59" in output


def test_embed_refuses_only_undecodable_images(embed, images):
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    code, output = embed()
    assert code == 2 and "59 of 59 images cannot be decoded" in output
    assert not Path("out.npy").exists()


def test_embed_logs_a_list_s_own_paths(embed, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "1.png").write_bytes(b"no image")
    (tmp_path / "sub" / "list.txt").write_text(f"1.png\n{tmp_path}/sub/1.png\n")
    code, output = embed(data="sub/list.txt")
    paths = re.findall("cannot decode (.*): no image of a known format; it has no row", output)
    assert paths == ["sub/1.png", f"{tmp_path}/sub/1.png"]
    assert code == 2 and output.endswith("the first: sub/1.png\n")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["flat", "list.txt", "packed"])
@pytest.mark.short
def test_embed_lists_and_shards_have_equal_rows(embed, images, tmp_path, data):
    """The rows have the paths of the folder, the list or the shards."""
    embed(data=images)
    paths = json.loads(Path("out.json").read_text())["paths"]
    rows = dict(zip(paths, np.load("out.npy"), strict=True))
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(paths):
        shutil.copy(images / path, tmp_path / "flat" / f"{number:02d}.png")
    (tmp_path / "list.txt").write_text("".join(f"images/{path}\n" for path in paths[::-1]))
    pack(str(images), str(tmp_path / "packed"), Options(shard_images=20), Log(speaks=False))
    code, output = embed("--force", data=tmp_path / data)
    assert code == 0, output
    names = {
        "flat": lambda path: paths[int(path[:2])],
        "list.txt": lambda path: path.removeprefix("images/"),
        "packed": lambda path: path,
    }
    actual = json.loads(Path("out.json").read_text())["paths"]
    shown = [names[data](path) for path in actual]
    assert sorted(shown) == sorted(paths) and (data != "list.txt" or shown == paths[::-1])
    for path, row in zip(shown, np.load("out.npy"), strict=True):
        np.testing.assert_allclose(row, rows[path], rtol=1e-4, atol=1e-5)


def test_embed_refuses_other_images_rows(embed, images, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 2)
        embed()
    (images / "train" / "class1" / "1.png").rename(images / "train" / "class1" / "1b.png")
    code, output = embed()
    assert code == 2 and "error: out.npy.part: features with another set of images" in output


def test_embed_refuses_another_folder_s_rows(embed, images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 2)
        embed()
    shutil.copytree(images, tmp_path / "other")
    code, output = embed(data=tmp_path / "other")
    assert code == 2 and "error: out.npy.part: features with another DIR" in output
    assert embed()[0] == 0
    assert str(tmp_path) not in Path("out.json").read_text()


def test_embed_image_size_is_the_checkpoint_s(embed, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"format": 3, "config": {"image_size": 24}}, tmp_path / "run.pth.tar")
    for path, size in ((checkpoint, 224), (tmp_path / "run.pth.tar", 24)):
        weights = read_backbone(str(path))
        config = EmbedConfig(data="DIR", pretrained=str(path), out="x.npy")
        assert module.complete(config, weights).image_size == size
    weights.meta["config"]["image_size"] = "wide"
    with pytest.raises(RunError, match="--image-size wide"):
        module.complete(config, weights)


def test_embed_refuses_features_not_finite(embed, monkeypatch):
    forward = module.Pass.forward
    monkeypatch.setattr(module.Pass, "forward", lambda self, pixels: forward(self, pixels) / 0)
    code, output = embed()
    assert code == 1 and "features that are not finite" in output
    assert not Path("out.npy").exists()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["DIR: missing"]),
        ("{images}", ["--pretrained: missing", "--help"]),
        ("{images} --pretrained {net}", ["--out: missing", ".npy or .parquet"]),
        ("{images} --pretrained {net} --out f.csv", ["--out f.csv", ".npy or .parquet"]),
        ("{images} --pretrained nowhere --out f.npy", ["--pretrained nowhere: no such file"]),
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
def test_embed_mistakes_are_one_line(
    images, checkpoint, tmp_path, monkeypatch, capsys, line, parts,
):  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line.format(images=images, net=checkpoint)))
    output = capsys.readouterr().err
    assert (caught.value.code, output.count("\n"), output[:7]) == (2, 1, "error: ")
    assert all(part in output for part in parts)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_embed_help_shows_one_folder(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert "job.embed DIR [options]" in output and "--more-data" not in output


def test_embed_paths_expand_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["~/d", "--pretrained", "~/c", "--out", "~/o.npy"]
    config, _ = cli.read("job.embed", EmbedConfig, argv)
    assert (config.data, config.pretrained, config.out) == (
        "/home/me/d",
        "/home/me/c",
        "/home/me/o.npy",
    )


@pytest.mark.parametrize("page", ["README.md", "job/evaluate/README.md"])
def test_embed_commands_of_pages_are_valid(page):
    text = (ROOT / page).read_text()
    commands = re.findall(r"^ {4}(.*job\.embed .*|.*mgd-embed .*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        argv = shlex.split(command, comments=True)
        start = next(n for n, word in enumerate(argv) if word in ("job.embed", "mgd-embed"))
        config, given = cli.read("job.embed", EmbedConfig, argv[start + 1 :])
        assert {"data", "pretrained", "out"} <= given
        assert module.ending(config.out) in module.FORMATS


@pytest.mark.parametrize(
    ("lines", "limit", "count"), [("aabc", 1, None), ("aabc", 0, 1), ("aa", 9, 2)]
)
def test_embed_counts_a_file_listed_twice_once(lines, limit, count):
    """File a is undecodable. If no image is left, the program ends."""
    splits = Splits({"": ImageList("list.txt", list(lines), 0)})
    config = EmbedConfig(pretrained="net", out="f.npy", max_bad_images=limit)
    bad = dict.fromkeys((0, 1), "cut short")
    if count is None:
        module.check_bad(bad, splits, config)
    else:
        text = f"{count} of {len(lines)} images cannot be decoded, and --max-bad-images is {limit}"
        assert refused(module.check_bad, bad, splits, config) == f"{text}; the first: a"
