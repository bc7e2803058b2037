"""The pairs of student and teacher that a distiller accepts, and the errors of the others."""

from types import SimpleNamespace

import pytest
import timm
import torch

from errors import refused
from job.config import Config
from job.data.augment import MEAN, STD
from job.distill import DISTILLERS, Distiller
from job.distill.fit import check_fit
from job.distill.options import DistillOptions
from job.distill.teacher import load_teacher
from job.networks import build_resnet, network_outline
from runs import Kept

RUN = SimpleNamespace(
    on_first=lambda work: work(),
    build=lambda arch, work: work(),
    log=Kept(),
    device=torch.device("cpu"),
)
SIZE = 64
MOBILE, MOBILE2, VIT, NEXT = (
    f"timm/{name}"
    for name in ("mobilenetv3_small_050", "mobilenetv2_050", "test_vit", "test_convnext")
)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A function from a network's name to a teacher with random weights and all stages."""
    folder, loaded = tmp_path_factory.mktemp("teachers"), {}

    def load(arch):
        if arch not in loaded:
            torch.manual_seed(0)
            path = str(folder / f"{len(loaded)}.pth")
            if arch.startswith("timm/"):
                state = timm.create_model(arch.removeprefix("timm/"), num_classes=0).state_dict()
            else:
                state = build_resnet(arch, width=16).state_dict()
            torch.save(state, path)
            named = arch if arch.startswith("timm/") else ""
            options = DistillOptions(teacher=path, teacher_arch=named, image_size=SIZE)
            loaded[arch] = load_teacher(options, [1, 2, 3, 4], False, RUN)
        return loaded[arch]

    return load


def check(teacher, arch="resnet18", distill="simreg", every=DISTILLERS, **options):
    config = Config(
        arch=arch, width=16, distill=[distill], teacher="t.pth", image_size=SIZE, **options
    )
    student = network_outline(arch, config.stem, config.width, SIZE)
    check_fit(config, [DISTILLERS[distill]], every, student, teacher)


FITTING = [  # student, teacher, distiller, options
    ("resnet18", "resnet18", "mgd", {}),
    ("resnet18", MOBILE2, "mgd", {}),
    (MOBILE, "resnet18", "mgd", {}),
    ("resnet18", MOBILE, "mgd", {"mgd_stages": [1, 2, 3]}),
    ("resnet18", MOBILE, "projector", {}),
    (NEXT, "resnet18", "gram", {"gram_stages": [1, 2, 3]}),
    (NEXT, NEXT, "projector", {}),
    *[("resnet18", VIT, name, {}) for name in ("simreg", "similarity", "disco")],
    (MOBILE, VIT, "similarity", {"similarity": "compress"}),
    (MOBILE, VIT, "simreg", {"framework": "none"}),
    ("resnet18", "resnet18", "gram", {"framework": "none"}),
]


@pytest.mark.parametrize(("student", "teacher", "distill", "options"), FITTING, ids=str)
def test_check_fit_accepts_pair(teachers, student, teacher, distill, options):
    check(teachers(teacher), student, distill, **options)


FEW = "Use one of: simreg, similarity"
REFUSED = {  # student, teacher, distiller: options, and a phrase of the message
    ("resnet18", VIT, "mgd"): (
        {},
        "--distill mgd: the maps of layer1 are 16 x 16 in resnet18 and 10 x 10 in the teacher "
        f"(timm/test_vit); expected equal sizes. {FEW}, disco",
    ),
    ("resnet18", VIT, "projector"): ({}, "--distill projector: the maps of layer1 are 16 x 16"),
    (NEXT, NEXT, "mgd"): (
        {},
        "--distill mgd: layer1 of the teacher (timm/test_convnext) does not end in a batch norm",
    ),
    (VIT, VIT, "gram"): (
        {},
        "the maps of layer1 are 4 x 4 in timm/test_vit and 10 x 10 in the teacher (timm/test_vit)",
    ),
    ("resnet18", MOBILE, "mgd"): (
        {},
        "batch norm; expected one, which gives the margins. Use one of: projector, gram",
    ),
    (MOBILE, "resnet18", "gram"): (
        {"framework": "none"},
        "no chosen distiller trains conv_head.bias of timm/mobilenetv3_small_050",
    ),
    (MOBILE, "resnet18", "mgd"): (
        {"mgd_pooled": 1.0},
        "expected the maps of layer4, or no --mgd-pooled",
    ),
}


@pytest.mark.parametrize("pair", REFUSED, ids=str)
def test_check_fit_refuses_pair(teachers, pair):
    (student, teacher, distill), (options, expected) = pair, REFUSED[pair]
    message = refused(check, teachers(teacher), student, distill, **options)
    assert expected.replace(", disco", "") in message


def test_fitting_list_has_disco_only_with_head(teachers):
    teacher = teachers(VIT)
    assert not teacher.has_head and "disco" not in refused(check, teacher, "resnet18", "mgd")
    with_head = SimpleNamespace(**{**vars(teacher), "has_head": True, "shown": "x"})
    assert "disco" in refused(check, with_head, "resnet18", "mgd")


def test_fitting_list_has_stages_of_equal_size(teachers):
    """With 160 pixels a ViT has 10 x 10 positions, like a ResNet's third stage."""
    teacher = teachers(VIT)
    config = Config(arch="resnet18", width=16, distill=["mgd"], teacher="t.pth", image_size=160)
    student = network_outline("resnet18", "imagenet", 16, 160)
    message = refused(check_fit, config, [DISTILLERS["mgd"]], DISTILLERS, student, teacher)
    assert message.endswith("projector with --projector-stages 3, gram with --gram-stages 3")


def test_new_distiller_is_in_the_lists(teachers):
    """Messages list the registered distillers, without an edit of them."""
    every = DISTILLERS | {"new": type("New", (Distiller,), {"name": "new"})}
    pair = teachers("resnet18"), MOBILE, "gram"
    message = refused(check, *pair, framework="none", every=every)
    expected = "expected one of simreg, similarity, disco, new. Add one to --distill"
    assert message.endswith(expected)
    assert refused(check, teachers(VIT), distill="mgd", every=every).endswith(", new")


@torch.no_grad()
def test_teacher_gets_its_own_size_and_colours(teachers):
    """The student's normalised images become colours again, normalised by timm's mean."""
    teacher = teachers(VIT)
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    plain = timm.create_model("test_vit", num_classes=0).eval()
    plain.load_state_dict({n.removeprefix("body."): v for n, v in teacher.net.state_dict().items()})
    actual = teacher.net((images - mean) / std)
    torch.testing.assert_close(actual["pooled"], plain((images - 0.5) / 0.5), rtol=1e-3, atol=1e-4)
    assert list(actual) == ["layer1", "layer2", "layer3", "layer4", "pooled"]
    small = teacher.net((images[:, :, ::5, ::5] - mean) / std)
    assert small["layer4"].shape == actual["layer4"].shape and teacher.widths["pooled"] == 64
