"""job.export of a real run: the files load, and the card has the figures of the records."""

import re
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard

from runs import of_kind


@pytest.fixture(scope="module")
def trained(folders):
    """A run with a teacher. Its linear run is in the next folder."""
    return folders[0]


def export(*arguments):
    command = [sys.executable, "-m", "job.export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.short
def test_export_of_a_run(trained, images, tmp_path):
    """The card has the figures of the records, and each file gives the same features."""
    for name in ("model.safetensors", "model.onnx"):
        done = export(trained / "last.pth.tar", tmp_path / name)
        assert (done.returncode, done.stderr) == (0, "")
    card = (tmp_path / "model.md").read_text()
    knn = of_kind(trained, "knn")[-1]
    last = of_kind(trained.with_name("run-linear"), "validation")[-1]
    expected = [f"{value:.2f}" for value in (knn["knn"], last["val_top1"], last["val_top5"])]
    assert re.findall(r"^- .*?: \*\*(\S+) %\*\*", card, re.MULTILINE) == expected
    results = ModelCard.load(tmp_path / "model.md").data.eval_results
    assert [f"{result.metric_value:.2f}" for result in results] == expected

    [start], [teacher] = of_kind(trained, "start"), of_kind(trained, "teacher")
    assert (start["images"], start["labelled"]) == (50, 50)
    assert f"- Images: `{images.name}`; 50 images; all with a label" in card
    content = torch.load(trained / "last.pth.tar", weights_only=True)
    digest = content["teacher"]
    assert f"- Teacher: `{teacher['arch']}` from `teacher.pth.tar`, digest `{digest}`" in card
    assert "- Epochs: 2 of 2\n- Batch: 8 images, over 2 workers\n- Seed: 3\n" in card
    assert "horovodrun -np 2 python -m job.train" in card and str(tmp_path.parent) not in card

    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    cpu = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=cpu)
    with torch.no_grad():
        features = net(pixels)
    of_onnx = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
    assert (of_onnx - features).abs().max() <= 1e-4 * features.abs().max()


def test_export_error_is_one_line(trained, tmp_path):
    (tmp_path / "x.md").write_text("mine")
    done = export(trained / "last.pth.tar", tmp_path / "x.pth")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--no-card" in done.stderr and not (tmp_path / "x.pth").exists()
