"""The teacher: its head, stem, image size, errors and bf16 weights."""

from types import SimpleNamespace

import pytest
import timm
import torch
from errors import refused
from torch import nn

from job.distill.options import DistillOptions
from job.distill.teacher import load_teacher
from job.frameworks.simsiam import build_projector
from job.networks import build_mlp, build_resnet, with_features
from runs import Kept

C, DIM = 128, 7  # features of the network, and outputs of its head
RUN = SimpleNamespace(
    on_first=lambda work: work(),
    build=lambda arch, work: work(),
    log=Kept(),
    device=torch.device("cpu"),
)


def normed():
    """Return a head as in lightly, with a batch norm."""
    return nn.ModuleDict(
        {
            "layers": nn.Sequential(
                nn.Linear(C, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, DIM)
            )
        }
    )


HEADS = {  # prefix of the network and of the head, and the head
    "linear": ("module.encoder_q.", "module.encoder_q.fc.", lambda: nn.Linear(C, DIM)),
    "moco": ("module.encoder_q.", "module.encoder_q.fc.", lambda: build_mlp(C, 20, DIM)),
    "simsiam": ("module.encoder.", "module.encoder.fc.", lambda: build_projector(C, 20, DIM)),
    "lightly": ("backbone.", "projection_head.", normed),
}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build_resnet("resnet18", stem="small", width=16)


def shaken(head):
    """Return a head with random tensors. Variances are above 0."""
    for name, value in head.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                torch.rand(value.shape) + 0.1 if "var" in name else torch.randn(value.shape)
            )
    return head.eval()


def write(path, net, prefix, start="", head=None):
    body = {
        prefix + name: value
        for name, value in net.state_dict().items()
        if not name.startswith("fc.")
    }
    own = {start + name: value for name, value in (head or {}).items()}
    torch.save({"state_dict": body | own}, path)
    return str(path)


def options(path, **others):
    return DistillOptions(teacher=path, stem="small", **others)


def load(path, needs_head=True):
    return load_teacher(options(path), [4], needs_head, RUN)


@pytest.mark.parametrize("name", HEADS)
def test_features_include_head_outputs(tmp_path, net, name):
    prefix, start, make = HEADS[name]
    torch.manual_seed(1)
    head = shaken(make())
    path = write(tmp_path / "teacher", net, prefix, start, head.state_dict())
    images = torch.randn(3, 3, 16, 16)
    teacher = load(path)
    actual = teacher.net(images)
    with torch.no_grad():
        maps = with_features(net.eval(), [4], None)(images)["layer4"]
        expected = (head["layers"] if name == "lightly" else head)(maps.relu().mean((2, 3)))
    assert teacher.head_dim == DIM and torch.allclose(actual["fc"], expected, rtol=1e-3, atol=1e-4)
    assert not actual["fc"].requires_grad and not teacher.net.training
    assert any(name.startswith("teacher.fc.") for name in teacher.state())


def test_head_is_not_built_without_need(tmp_path, net):
    """The digest then depends only on the network, as in older checkpoints."""
    prefix, start, make = HEADS["moco"]
    paths = [write(tmp_path / str(n), net, prefix, start, make().state_dict()) for n in range(2)]
    without, with_head = ([load(path, needs) for path in paths] for needs in (False, True))
    assert (
        list(without[0].net(torch.zeros(1, 3, 16, 16))) == ["layer4"] and without[0].head_dim == 0
    )
    assert without[0].digest == without[1].digest
    assert len({teacher.digest for teacher in (*without, *with_head)}) == 3


def test_load_teacher_refuses_other_stem(tmp_path, net):
    path = write(tmp_path / "teacher", net, "")
    message = refused(load_teacher, DistillOptions(teacher=path), [4], False, RUN)
    problem = "its stem is small; expected imagenet, as in the student. Choose --stem small"
    assert message.endswith(problem)
    load_teacher(DistillOptions(teacher=path, arch=VIT), [4], False, RUN)


VIT, MAXVIT = "timm/test_vit", "timm/test_maxvit"


@pytest.fixture(scope="module")
def other_file(tmp_path_factory):
    """A function from a network of timm to its file."""

    def write(arch):
        path = tmp_path_factory.mktemp("timm") / "teacher.pth"
        net = timm.create_model(arch.removeprefix("timm/"), num_classes=0)
        torch.save(net.state_dict(), path)
        return str(path)

    return write


def test_teacher_size_sets_map_size(other_file):
    given = options(other_file(VIT), teacher_arch=VIT, image_size=32, teacher_size=96)
    teacher = load_teacher(given, [4], False, RUN)
    assert teacher.outline.maps[4] == (64, 6, 6)  # patches of 16 pixels
    assert teacher.net(torch.randn(2, 3, 32, 32))["layer4"].shape == (2, 64, 6, 6)


def test_load_teacher_refuses_teacher_size(other_file):
    given = options(other_file(MAXVIT), teacher_arch=MAXVIT, teacher_size=50)
    message = refused(load_teacher, given, [4], False, RUN)
    assert message.startswith(f"{MAXVIT} cannot process 50 x 50 pixels: ")
    assert message.endswith(". Choose another --teacher-size")


nan = torch.full((DIM, C), torch.nan)
REFUSED = {
    "none": ({}, "no head on its network"),
    "narrow": (nn.Linear(C - 1, DIM).state_dict(), "(linear 127-7) cannot be used"),
    "nan": ({"weight": nan}, "weight has values that are not finite"),
    "integers": ({"weight": torch.ones(DIM, C).long()}, "weight is torch.int64, expected floats"),
    "unknown": (
        {"mlp.0.weight": torch.ones(DIM, C)},
        "mlp.0.weight belongs to no linear layer or batch norm",
    ),
    "convolution": (
        {"0.weight": torch.ones(DIM, C), "1.weight": torch.ones(DIM, DIM, 1)},
        "belong to no linear layer",
    ),
    "surplus": (
        {"weight": torch.ones(DIM, C), "scale": torch.ones(1)},
        'Unexpected key(s) in state_dict: "scale"',
    ),
    "bias": ({"weight": torch.ones(DIM, C), "bias": torch.ones(3)}, "size mismatch for bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_teacher_refuses_head(tmp_path, net, case):
    head, cause = REFUSED[case]
    path = write(tmp_path / "teacher", net, "module.encoder_q.", "module.encoder_q.fc.", head)
    message = refused(load, path)
    assert message.startswith(f"--teacher {path}: ") and cause in message
    assert (
        "expected linear layers, batch norms and ReLUs" in message
        and "distillers that need no head" in message
    )
    load(path, needs_head=False)


def test_bf16_weights_give_bytes_of_autocast(net, tmp_path):
    """Convolutions and linear layers are converted, batch norms of a head are not."""
    prefix, start, make = HEADS["simsiam"]
    path = write(tmp_path / "teacher", net, prefix, start, make().state_dict())
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = [options(path, image_size=16, precision=each) for each in ("float32", "bf16")]
    nets = [load_teacher(each, [1, 4], True, RUN).net for each in given]
    with torch.autocast("cpu", torch.bfloat16):
        plain, stored = (each(images) for each in nets)
    assert plain.keys() == stored.keys() and all(
        torch.equal(plain[name], stored[name]) for name in plain
    )
    for each in nets[1].modules():
        if isinstance(each, nn.Conv2d | nn.Linear | nn.BatchNorm1d) and each.weight is not None:
            assert each.weight.dtype == (
                torch.float32 if isinstance(each, nn.BatchNorm1d) else torch.bfloat16
            )
