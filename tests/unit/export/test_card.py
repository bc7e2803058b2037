"""The model card: its figures, its front matter, and its code."""

import dataclasses
import json
import os
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
import torchvision
import yaml
from huggingface_hub import ModelCard
from torch import nn

from job.checkpoints.folder import Checkpoints
from job.checkpoints.seal import read_seal
from job.cluster import comm
from job.config import Config, read_config
from job.errors import RunError
from job.export import export, main
from job.export import options as module
from job.export.card import code, write_card
from job.export.network import read_network
from job.export.options import command
from job.export.origin import describe_origin
from job.frameworks.moco import build_moco

HOME = "/home/somebody"
SIZE = 32
VALUES = dict(
    data=f"{HOME}/birds/",
    out=f"{HOME}/runs/mine",
    teacher=f"{HOME}/big.pth.tar",
    arch="resnet18",
    mlp=True,
)
VALUES |= dict(
    image_size=SIZE,
    epochs=20,
    batch_size=64,
    seed=7,
    loss_share=0.0,
    loss_factor=300.0,
    mgd_stages=[3, 4],
)
START = dict(
    kind="start",
    time=1.0,
    epoch=0,
    step=0,
    workers=2,
    nodes=1,
    images=3786,
    labelled=0,
    steps_an_epoch=59,
)
START |= dict(device="one GPU", versions="torch 1, horovod 2", losses=["contrastive"])
KNN = dict(kind="knn", epoch=12, knn=85.256, knn_k=25, knn_images=500)
VALIDATION = dict(kind="validation", epoch=98, val_top1=71.5, val_top5=90.25, val_images=480)


def options(config):
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("config", "out", "resume")
    }


def write_records(folder, *records):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder after 12 epochs with options VALUES, and a linear run of it."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for name in ("mine", "mine-linear"):
        folder.with_name(name).mkdir()
    moco = build_moco(comm, "resnet18", K=64, mlp=True)
    config = Config(**VALUES)
    content = {
        "epoch": 12,
        "step": 0,
        "arch": "resnet18",
        "workers": 2,
        "images": 3786,
        "teacher": "0123456789abcdef",
    }
    content |= {
        "state_dict": {
            f"module.{name}": value
            for name, value in moco.state_dict().items()
            if "encoder_k" not in name
        }
    }
    path = Checkpoints(str(folder), 3).save(
        content | {"optimizer": {}, "config": dataclasses.asdict(config), "mgd": {}}
    )
    network, weights = read_network(path, "", None)
    state = {
        f"module.{name}": value
        for name, value in moco.encoder_q.state_dict().items()
        if not name.startswith("fc.")
    }
    state |= {f"module.fc.{name}": value for name, value in nn.Linear(512, 10).state_dict().items()}
    linear = {"pretrained": path, "data": f"{HOME}/other birds", "epochs": 100}
    Checkpoints(f"{folder}-linear", 3).save(
        content | {"epoch": 100, "state_dict": state, "config": linear, "teacher": ""}
    )
    return SimpleNamespace(
        folder=folder, path=path, config=config, network=network, weights=weights, linear=linear
    )


@pytest.fixture
def run(made, tmp_path):
    """A copy with all records, and `card`, a function that returns the card's text."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for kind in ("", "-linear"):
        other = tmp_path / f"mine{kind}"
        other.mkdir(exist_ok=True)
        for path in made.folder.with_name(f"mine{kind}").iterdir():
            os.symlink(os.readlink(path), other / path.name) if path.is_symlink() else os.link(
                path, other / path.name
            )
    checkpoint = str(folder / "last.pth.tar")
    origin = describe_origin(checkpoint, made.network, made.weights)

    def card(weights=made.weights, network=made.network):
        return write_card(
            network, weights, origin, checkpoint, "student.pth", "torchvision"
        ).decode()

    teacher = dict(kind="teacher", time=1.0, arch="resnet50", path=VALUES["teacher"])
    step = dict(kind="step", steps=1, epoch=0, step=0, loss=1.0)
    records = [teacher, START | {"options": options(made.config)}, step, KNN]
    write_records(folder, *records)
    linear = dict(START, options=made.linear, images=3000)
    write_records(
        tmp_path / "mine-linear", linear, VALIDATION, VALIDATION | {"epoch": 99, "val_top1": 71.125}
    )
    return SimpleNamespace(
        folder=folder, checkpoint=checkpoint, records=records, card=card, linear=linear
    )


def section(card, title):
    """Return the lines of a section."""
    return re.search(rf"## {title}\n\n(.*?)\n(?=\n## |$)", card, re.DOTALL)[1].splitlines()


def test_card_has_the_training(run):
    lines = section(run.card(), "Training")
    blank = lines.index("")
    assert lines[:blank] == [
        "- Images: `birds`; 3,786 images; none with a label (the training uses no labels)",
        "- Framework: `moco`",
        "- Distillers: `mgd`",
        "- Teacher: `resnet50` from `big.pth.tar`, digest `0123456789abcdef`",
        "- Epochs: 12 of 20",
        "- Batch: 64 images, over 2 workers",
        "- Seed: 7",
        "- Side of the views: 32 pixels",
        "- Device and versions: `one GPU`; `torch 1, horovod 2`",
    ]
    shown = [line.strip() for line in lines[blank:] if line.startswith("    ")]
    assert (
        "image_size: 32 (default: 224)" in shown
        and "mgd_stages: [3, 4] (default: [1, 2, 3, 4])" in shown
    )
    assert shown[-1].startswith("horovodrun -np 2 python -m job.train birds ")
    assert not [line for line in shown if line.startswith(("out:", "arch:", "config:"))]


def test_card_has_the_accuracies(run):
    assert section(run.card(), "Accuracy") == [
        "- k-NN, top-1: **85.26 %** on `birds` (of 500 images, k = 25, after 12 epochs; "
        "kind knn in metrics.jsonl of the run mine)",
        "- linear classifier, top-1: **71.12 %** on `other birds` "
        "(of 480 images, after 100 epochs of 100; best after 99 epochs: 71.50 %; "
        "kind validation in metrics.jsonl of mine-linear)",
        "- linear classifier, top-5: **90.25 %** on `other birds` "
        "(of 480 images, after 100 epochs of 100; kind validation in metrics.jsonl of mine-linear)",
    ]


def knn_line(run, **more):
    return section(run.card(**more), "Accuracy")[0]


def test_card_has_only_the_epoch_s_accuracy(made, run):
    write_records(
        run.folder, *run.records[:-1], KNN | {"epoch": 10, "knn": 83.0}, KNN | {"epoch": 14}
    )
    assert (
        knn_line(run)
        == "- k-NN, top-1: not measured (no record after 12 epochs; after 10 epochs 83.00 %)"
    )
    write_records(run.folder, *run.records[:-1])
    assert knn_line(run) == "- k-NN, top-1: not measured (no record after 12 epochs)"
    write_records(run.folder, *run.records)
    within = dataclasses.replace(made.weights, run=made.weights.run | {"step": 5})
    assert (
        knn_line(run, weights=within)
        == "- k-NN, top-1: not measured (the checkpoint is from within an epoch)"
    )
    assert "- Epochs: 12 of 20, and 5 steps of the next" in run.card(within)


@pytest.mark.parametrize("records", ["none", "another's"])
def test_card_ignores_another_run_s_records(made, run, records):
    other = dataclasses.replace(made.config, seed=8)
    write_records(
        run.folder, *([START | {"options": options(other)}, KNN] if records == "another's" else [])
    )
    card = run.card()
    assert (
        knn_line(run)
        == "- k-NN, top-1: not measured (the checkpoint's folder has no record of its run)"
    )
    assert "85" not in "".join(section(card, "Accuracy"))
    assert "3,786 images; labels: not recorded" in card
    assert "- Teacher: a network from `big.pth.tar`, digest `0123456789abcdef`" in card
    assert "- Device and versions: not recorded" in card


def test_card_allows_other_options_without_effect(made, run):
    changed = options(made.config) | {"workers": 5, "print_freq": 99, "tensorboard": True}
    write_records(run.folder, START | {"options": changed}, KNN)
    assert "85.26 %" in knn_line(run)


@pytest.mark.parametrize(
    ("labelled", "expected"),
    [(3786, "all with a label"), (17, "17 with a label"), (None, "labels: not recorded")],
)
def test_card_has_the_start_s_labels(made, run, labelled, expected):
    start = {name: value for name, value in START.items() if name != "labelled"} | {
        "options": options(made.config)
    }
    write_records(run.folder, start | ({} if labelled is None else {"labelled": labelled}))
    assert f"; 3,786 images; {expected}" in run.card()


def test_card_reads_the_hint_of_missing_labels(made, run):
    start = {name: value for name, value in START.items() if name != "labelled"} | {
        "options": options(made.config)
    }
    write_records(run.folder, start, dict(kind="hint", time=1.0, id="unlabelled", text="x"))
    assert "3,786 images; none with a label" in run.card()


def test_card_checks_a_linear_run_s_weights(made, run):
    linear = run.folder.with_name("mine-linear")
    problem = "the run mine-linear has other frozen weights"
    changed = made.weights.state | {"bn1.bias": made.weights.state["bn1.bias"] + 1}
    card = run.card(dataclasses.replace(made.weights, state=changed))
    assert f"- linear classifier, top-1: not measured ({problem})" in card
    (linear / "last.pth.tar").unlink()
    (linear / "last.pth.tar").write_bytes(b"no checkpoint")
    assert (
        "not measured (the run mine-linear has no checkpoint that can be compared: " in run.card()
    )
    write_records(linear, run.linear)
    shutil.copy(made.folder.with_name("mine-linear") / "last.pth.tar", linear / "last.pth.tar")
    assert "not measured (the run mine-linear has no record of an accuracy)" in run.card()
    shutil.rmtree(linear)
    assert "not measured (no run mine-linear next to its folder)" in run.card()


def test_card_has_valid_front_matter(run, tmp_path):
    (tmp_path / "student.md").write_text(run.card())
    data = ModelCard.load(tmp_path / "student.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "unknown",
        "timm",
        "image-feature-extraction",
    )
    assert data.tags == ["self-supervised-learning", "moco", "knowledge-distillation", "mgd"]
    assert data.model_name == "student"
    actual = {
        (result.metric_name, result.dataset_name): result.metric_value
        for result in data.eval_results
    }
    assert actual == {
        ("k-NN, top-1 (%)", "birds"): 85.26,
        ("linear classifier, top-1 (%)", "other birds"): 71.12,
        ("linear classifier, top-5 (%)", "other birds"): 90.25,
    }


def test_card_has_no_full_path(run):
    card = run.card()
    assert HOME not in card and str(run.folder.parent) not in card


def test_card_has_the_file_s_provenance(made, run):
    lines = section(run.card(), "Provenance")
    with open(run.checkpoint, "rb") as file:
        data = file.read()
    assert read_seal(run.checkpoint) == data[-64:].decode()
    [source] = [line for line in lines if line.startswith("- Source: ")]
    assert source.startswith("- Source: `checkpoint_0012_000000.pth.tar`, SHA-256 `")
    assert f"- Seal of the source: `{data[-64:].decode()}`" in lines
    assert f"- Digest of the weights, as runs log a teacher's: `{made.weights.digest}`" in lines


def test_card_of_a_foreign_file_has_no_training(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    export(str(tmp_path / "theirs.pth"), str(tmp_path / "x.safetensors"))
    card = (tmp_path / "x.md").read_text()
    assert section(card, "Training") == ["The checkpoint has no record of the training."]
    assert [line.split(" (")[0] for line in section(card, "Accuracy")] == [
        "- k-NN, top-1: not measured",
        "- linear classifier, top-1: not measured",
    ]
    assert "- Seal of the source: none, another program wrote it" in card
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "unknown",
        "pipeline_tag": "image-feature-extraction",
        "library_name": "timm",
    }


@pytest.mark.parametrize("name", ["a`b", "``", "a|b", "# x", "a\nb\x1b[2J", "---", "🐦 x"])
def test_card_keeps_any_name_on_one_line(made, run, name):
    config = made.weights.meta["config"] | {"data": f"/data/{name}", "teacher": f"/x/{name}"}
    weights = dataclasses.replace(made.weights, meta=made.weights.meta | {"config": config})
    plain, card = run.card(), run.card(weights)
    assert card.isascii() == name.isascii() and "\x1b" not in card
    before = [line for line in plain.splitlines() if line.startswith("#")]
    assert [line for line in card.splitlines() if line.startswith("#")] == before
    assert isinstance(yaml.safe_load(card.split("---\n")[1]), dict)


def test_card_shows_foreign_options(made, run):
    config = {
        "data": 1.5,
        "more_data": 5,
        "teacher": 3,
        "distill": None,
        "epochs": [2],
        7: 8,
        "framework": None,
    }
    weights = dataclasses.replace(made.weights, meta=made.weights.meta | {"config": config})
    card = run.card(weights)
    assert "- Images: `1.5`, `5`; " in card and "- Teacher: a network from `3`" in card
    assert "    7: 8 (default: None)" in card


@pytest.mark.parametrize(
    ("text", "expected"), [("a", "`a`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("", "`  `")]
)
def test_code_quotes_any_text(text, expected):
    assert code(text) == expected


# The command with the same options


@pytest.mark.parametrize(
    "line",
    [
        "birds",
        "birds -a resnet50 --mlp --moco-t 0.2 --aug-plus --cos --epochs 7 --batch-size 32",
        "birds more --teacher big.pth --loss-factor 500 --mgd-stages 2 4 --stage-weights 1 0.5",
        "birds --teacher big.pth --distill mgd simreg --loss-share 5 --matching random",
        "birds --framework simsiam --save-every 500steps --no-mlp --weak-views",
        "birds --config imagenet --teacher big.pth",
        "birds --config compress --teacher big.pth --lr 0.5",
        "birds --config compress --teacher big.pth --cos",
        "birds --config compress --teacher big.pth --loss-share 5",
    ],
)
def test_command_gives_the_same_options(line):
    config = read_config(line.split())
    written = command(dataclasses.asdict(config), 1)
    assert written.startswith("python -m job.train birds")
    again = read_config(shlex.split(written)[3:])
    effects = {
        "config",
        "loss_factor" if config.loss_share else "",
        "schedule" if config.cos else "",
    }
    effects |= {name for name in ("schedule", "loss_share") if not config.teacher}
    differs = {
        name for name, value in dataclasses.asdict(config).items() if getattr(again, name) != value
    }
    assert differs <= effects


@pytest.mark.parametrize("option", [{"knn_k": 5}, {"gram_tau": 0.2}, {"distill": ["gram"]}])
def test_command_omits_options_without_effect(option):
    config = dataclasses.asdict(Config(data="birds", **option))
    assert command(config, 1) == "python -m job.train birds"


@pytest.mark.parametrize(
    "change", [{"later": 1}, {"epochs": "many"}, {"framework": "none at all"}, {"data": "-x"}]
)
def test_command_of_another_version_is_empty(made, run, change):
    config = dataclasses.asdict(made.config) | change
    assert command(config, 2) == ""
    weights = dataclasses.replace(made.weights, meta=made.weights.meta | {"config": config})
    assert "python -m job.train" not in run.card(weights)


def test_command_that_differs_is_omitted(made, monkeypatch):
    monkeypatch.setattr(
        module, "read_config", lambda argv: dataclasses.replace(made.config, seed=8)
    )
    assert command(dataclasses.asdict(made.config), 2) == ""


# How the files are loaded


def test_card_code_runs(made, run, tmp_path, monkeypatch):
    for name in ("student.pth", "student.safetensors"):
        export(run.checkpoint, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    assert sorted(name for name in os.listdir() if "mine" not in name) == [
        "config.json",
        "student.md",
        "student.pth",
        "student.safetensors",
    ]
    card = (tmp_path / "student.md").read_text()
    loading = "\n".join(section(card, "Loading"))
    blocks = re.findall(r"(?<=\n\n)(?:      .*\n?)+", loading)
    assert len(blocks) == 5  # two of timm's
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for block in blocks[:3]:
        names = {}
        exec("\n".join(line.strip() for line in block.splitlines()), names)
        net = names["net"].eval()
        net.fc = nn.Identity()
        with torch.no_grad():
            assert (net(images) - made.network.body(images)).abs().max() <= 1e-5
    assert (
        "get_cfg()" in blocks[3]
        and "cfg.merge_from_list(['MODEL.WEIGHTS', 'student.pkl'" in blocks[3]
    )
    assert "onnxruntime.InferenceSession('student.onnx')" in blocks[4]


# Where the card is written


def test_card_is_kept_unless_forced(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with open("x.md", "w") as file:
        file.write("mine")
    with pytest.raises(RunError) as caught:
        export(run.checkpoint, "x.pth")
    fix = "Choose another OUTPUT, keep it with --no-card, or add --force"
    assert str(caught.value) == f"x.md: exists with other content; expected a new file. {fix}"
    assert caught.value.code == 2 and not os.path.exists("x.pth")
    main([run.checkpoint, "x.pth", "--no-card"])
    with open("x.md") as file:
        assert file.read() == "mine"
    main([run.checkpoint, "x.pth", "--force"])
    with open("x.md") as file:
        assert file.read().startswith("---\nlicense: unknown\n")
    assert ", with x.md; load it with: " in capsys.readouterr().out


def test_no_card_option_writes_no_card(run, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    main([run.checkpoint, str(folder / "x.pth"), "--no-card"])
    assert os.listdir(folder) == ["x.pth"]


def test_card_refuses_the_name_of_another_file(run, tmp_path):
    with pytest.raises(RunError) as caught:
        export(run.checkpoint, str(tmp_path / "x.md"), "timm", force=True)
    problem = f"{tmp_path}/x.md is another file of this export; expected another name"
    assert str(caught.value) == f"{tmp_path}/x.md: {problem}"
    os.symlink(run.checkpoint, tmp_path / "y.md")
    with pytest.raises(RunError, match="expected another name"):
        export(run.checkpoint, str(tmp_path / "y.pth"), force=True)
    assert not (tmp_path / "y.pth").exists()


def test_card_error_writes_no_file(run, tmp_path):
    folder = tmp_path / "out"
    (folder / "x.md").mkdir(parents=True)
    (folder / "x.md.new").mkdir()
    with pytest.raises(RunError) as caught:
        export(run.checkpoint, str(folder / "x.pth"), force=True)
    assert (
        str(caught.value) == f"cannot write {folder}/x.md: Is a directory"
        and caught.value.code == 1
    )
    assert sorted(os.listdir(folder)) == ["x.md", "x.md.new"]


def test_card_reports_unreadable_records(run, tmp_path, capsys):
    (run.folder / "metrics.jsonl").unlink()
    os.mkfifo(run.folder / "metrics.jsonl")
    with pytest.raises(SystemExit) as caught:
        main([run.checkpoint, str(tmp_path / "x.pth")])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: model card: {os.path.realpath(run.folder)}/metrics.jsonl: ")
    assert err.endswith("--no-card leaves it out\n")
    assert not (tmp_path / "x.pth").exists()
