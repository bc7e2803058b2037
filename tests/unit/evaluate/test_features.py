"""Features in groups of one size, and the network that computes them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from job.checkpoints.foreign import Backbone, read_backbone
from job.data.augment import normalize
from job.data.folders import scan
from job.data.views import collate
from job.errors import RunError
from job.evaluate import features as module
from job.evaluate.features import GROUP, MarkedCrops, Pass, build_encoder, problems, split_groups
from job.networks import build_resnet

RUN = SimpleNamespace(
    device=torch.device("cpu"),
    autocast=lambda precision: torch.autocast("cpu", torch.bfloat16, precision == "bf16"),
)


class Spy(torch.nn.Module):
    """An encoder that keeps its inputs. Its features are the means of the colours."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, images):
        self.inputs.append(images)
        return {"flatten": images.mean((2, 3))}


@pytest.mark.parametrize("n", [1, 5, GROUP])
def test_forward_pads_to_a_full_group(n):
    """Black images complete it, in the layout of a full group."""
    pixels = torch.randint(256, (n, 9, 9, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    spy = Spy()
    actual = Pass(spy, 9, "float32", 0, RUN).forward(pixels)
    (inputs,) = spy.inputs
    assert inputs.shape == (GROUP, 3, 9, 9)
    full = torch.zeros(GROUP, 9, 9, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert inputs.stride() == normalize(full).stride()
    assert torch.equal(inputs[:n], normalize(pixels))
    assert torch.equal(inputs[n:], normalize(torch.zeros(GROUP - n, 3, 9, 9, dtype=torch.uint8)))
    assert torch.equal(actual, spy(normalize(pixels))["flatten"])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_forward_gives_the_network_s_features(precision):
    torch.manual_seed(0)
    net = build_resnet("resnet18", stem="small", width=16)
    weights = Backbone("resnet18", "small", 16, net.state_dict(), "", "none", {})
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    compute = Pass(build_encoder(weights, False, ""), 16, precision, 0, RUN)
    actual = compute.forward(images)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = net.eval()(normalize(images))
    assert (actual.dtype, actual.shape, compute.width) == (torch.float32, (3, 128), 128)
    assert (actual >= 0).all()  # after the last ReLU
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0.05 if precision == "bf16" else 1e-4,
        atol=0.02 * expected.max().item(),
    )
    assert (precision == "float32") == torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_encoder_with_head_gives_its_outputs(narrow_file):
    path, net = narrow_file
    compute = Pass(build_encoder(read_backbone(path), True, path), 16, "float32", 0, RUN)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = net.eval()(normalize(images))
    assert compute.width == 24
    torch.testing.assert_close(compute.forward(images), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def narrow_file(tmp_path):
    """A state dict of a narrow ResNet-18 with an MLP as its head, and the network."""
    torch.manual_seed(0)
    net = build_resnet("resnet18", dim=24, mlp=True, stem="small", width=16)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    return str(tmp_path / "net.pth"), net


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda state: {name: state[name] for name in state if not name.startswith("fc.")},
            "no head",
        ),
        (lambda state: state | {"fc.0.weight": torch.zeros(128, 64)}, "other layers"),
        (lambda state: state | {"fc.1.weight": torch.zeros(3, 3, 3)}, "other layers"),
        (lambda state: state | {"fc.2.bias": torch.full((24,), torch.nan)}, "not finite"),
    ],
)
def test_encoder_refuses_other_heads(narrow_file, change, part):
    path, net = narrow_file
    torch.save(change(net.state_dict()), path)
    with pytest.raises(RunError, match=f"--head: {path}: .*{part}.*Leave out --head") as caught:
        build_encoder(read_backbone(path), True, path)
    assert caught.value.code == 2


@pytest.mark.parametrize(("images", "sizes"), [(0, []), (1, [1]), (4, [4]), (9, [4, 4, 1])])
def test_groups_have_each_image_once(monkeypatch, images, sizes):
    monkeypatch.setattr(module, "GROUP", 4)
    groups = split_groups(range(images))
    assert [len(group) for group in groups] == sizes
    assert [index for group in groups for index in group] == list(range(images))


def test_rounds_mark_undecodable_images(tmp_path):
    for number in range(4):
        path = tmp_path / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 50 + number, dtype=np.uint8)).save(path)
    for number in (1, 2):
        (tmp_path / "train" / "a" / f"{number}.png").write_bytes(b"no image")
    images = scan(str(tmp_path), "train")
    crops = MarkedCrops(images, 8)
    pixels, decodable, errors = collate([crops[index] for index in range(4)])
    assert decodable.tolist() == [True, False, False, True]
    assert pixels[:, 0, 0, 0].tolist() == [50, 0, 0, 53]
    text = "no image of a known format"
    assert problems(images, range(4), decodable, errors) == {1: text, 2: text}
