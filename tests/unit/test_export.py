import dataclasses
import errno
import hashlib
import json
import os
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from job.cluster import comm
from job.config import Config
from job.errors import RunError
from job.export import detectron2, export, main, onnx
from job.export.app import companion_files, write
from job.export.formats import ENDINGS, FORMATS, Format
from job.export.network import SMALL_STEM, Network
from job.export.timm import configuration
from job.checkpoints.folder import Checkpoints
from job.checkpoints.foreign import read_backbone
from job.data.augment import MEAN, STD, CentreView, normalize
from job.networks import ARCHS, build_resnet
from job.frameworks.moco import build_moco

ENDING = {form: ending for ending, form in reversed(ENDINGS.items())}
SIZE = 32  # of the run's images, in pixels
PRIVATE = "/home/somebody"


class Student:
    """A checkpoint as a run saves it, of an encoder with random norms; the features that the encoder has under its head."""

    def __init__(self, folder, arch="resnet18", stem="imagenet", width=64):
        torch.manual_seed(3)
        self.arch, self.moco = (
            arch,
            build_moco(comm, arch, K=64, mlp=True, stem=stem, width=width).eval(),
        )
        for norm in self.moco.encoder_q.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.running_mean, 0, 0.1)
                for ranged in (norm.running_var, norm.weight):
                    nn.init.uniform_(ranged, 0.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.1)
                norm.num_batches_tracked += 7
        paths = dict(
            data=f"{PRIVATE}/birds/",
            out=f"{PRIVATE}/runs/mine",
            teacher=f"{PRIVATE}/teacher.pth.tar",
        )
        self.config = Config(
            **paths,
            config=[f"{PRIVATE}/a.yaml", "small"],
            arch=arch,
            stem=stem,
            width=width,
            image_size=SIZE,
            mlp=True,
        )
        content = {
            "epoch": 12,
            "arch": arch,
            "state_dict": {
                f"module.{key}": value
                for key, value in self.moco.state_dict().items()
                if "encoder_k." not in key
            },
            "optimizer": {"state": {}, "param_groups": []},
            "step": 0,
            "mgd": {"margin1": torch.ones(3)},
            "config": dataclasses.asdict(self.config),
            "workers": 2,
            "images": 50,
            "statistics": None,
        }
        self.path = Checkpoints(str(folder), 3).save(content)
        self.link = str(folder / "last.pth.tar")
        self.state = {
            key: value
            for key, value in self.moco.encoder_q.state_dict().items()
            if not key.startswith("fc.")
        }  # by torchvision's names

    @torch.no_grad()
    def features(self, images):
        """(B, 3, H, W) -> (B, C), seen where they enter the head."""
        seen = []
        hook = self.moco.encoder_q.get_submodule("fc.0").register_forward_pre_hook(
            lambda layer, inputs: seen.append(inputs[0])
        )
        self.moco.encoder_q(images)
        hook.remove()
        return seen[0]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A function that gives a Student, made once."""
    made = {}

    def student(*network, **options):
        key = (*network, *options.items())
        if key not in made:
            made[key] = Student(tmp_path_factory.mktemp("run"), *network, **options)
        return made[key]

    return student


@pytest.fixture(scope="module")
def exported(students, tmp_path_factory):
    """A function that gives an exported file's path and the report, made once."""
    made = {}

    def export_once(form, *network, **options):
        key = (form, *network, *options.items())
        if key not in made:
            path = str(tmp_path_factory.mktemp("export") / f"student{ENDING[form]}")
            made[key] = path, export(students(*network, **options).link, path)
        return made[key]

    return export_once


def images(number=3, size=SIZE, seed=0):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def assert_features(net, student, tolerance=1e-6):
    """A loaded network computes what the checkpoint's encoder does."""
    with torch.no_grad():
        assert (net.eval()(images()) - student.features(images())).abs().max() <= tolerance


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def fake_format(write):
    """A format with a writer of the test's."""
    return Format(write, lambda network, path: repr(path))


def refused(*arguments, **more):
    with pytest.raises(RunError) as caught:
        export(*map(str, arguments), **more)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.code


def loaded(report):
    """The network that the report's own statements load."""
    names = dict(torch=torch, torchvision=torchvision, timm=timm, safetensors=safetensors)
    exec(report.split("load it with: ")[1], names)
    return names["net"]


# torchvision


def test_a_plain_torchvision_network_lacks_but_its_head(students, exported):
    path, _ = exported("torchvision")
    state = torch.load(path, weights_only=True)
    assert all(type(key) is str and torch.is_tensor(value) for key, value in state.items())
    assert_same(state, students().state)
    net = torchvision.models.resnet18()
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    net.fc = nn.Identity()
    assert_features(net, students())


def test_torchvision_s_file_loads_mapped_and_survives_being_saved_again(exported, tmp_path):
    path, _ = exported("torchvision")
    state = torch.load(path, weights_only=True, mmap=True)
    torch.save(state, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same(again, state)
    assert again.origin == state.origin


# timm


def test_timm_s_network_takes_every_tensor(students, exported):
    path, _ = exported("timm")
    state = safetensors.torch.load_file(path)
    assert_same(state, students().state)
    net = timm.create_model("resnet18", num_classes=0)
    net.load_state_dict(state, strict=True)
    assert_features(net, students())
    assert_features(timm.create_model("resnet18", num_classes=0, checkpoint_path=path), students())


@pytest.mark.parametrize("arch", ARCHS)
def test_timm_names_every_network_as_torchvision_does(arch):
    with torch.device("meta"):
        theirs, ours = (
            timm.create_model(arch, num_classes=0).state_dict(),
            build_resnet(arch).state_dict(),
        )
    expected = {key: value.shape for key, value in ours.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in theirs.items()} == expected


@pytest.mark.parametrize("name", ["model.safetensors", "student.safetensors"])
def test_timm_builds_the_network_from_its_folder(students, tmp_path, name):
    report = export(students().path, str(tmp_path / name))
    assert "for timm, with config.json" in report
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(net.state_dict(), students().state)
    assert_features(net, students())
    assert net.num_classes == 0
    found = timm.data.resolve_model_data_config(net)
    expected = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD, "crop_pct": 0.875}
    assert {
        key: tuple(value) if isinstance(value, list) else value for key, value in found.items()
    } == expected | {
        "interpolation": "bilinear",
        "crop_mode": "center",
    }
    with_head = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=10)
    assert torch.equal(with_head.layer4[1].bn2.bias, students().state["layer4.1.bn2.bias"])
    assert with_head.fc.weight.shape == (10, 512)


@pytest.mark.parametrize("name", ["x.bin", "x.SAFETENSORS"])
def test_the_report_loads_timm_s_file_of_any_ending(students, tmp_path, name):
    report = export(students().path, str(tmp_path / name), "timm")
    assert_features(loaded(report), students())
    assert "local-dir" not in (tmp_path / "x.md").read_text()


def test_timm_s_configuration_is_what_timm_itself_writes(students, tmp_path):
    export(students("resnet50").path, str(tmp_path / "model.safetensors"))
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    timm.models.save_for_hf(net, tmp_path / "again", safe_serialization=True)
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path, tmp_path / "again")
    )
    assert ours["num_features"] == 2048
    for found, expected in (
        (ours.pop("pretrained_cfg"), theirs.pop("pretrained_cfg")),
        (ours, theirs),
    ):
        assert found and {key: expected[key] for key in found} == found


@pytest.mark.parametrize("size", [56, 224])
def test_timm_s_pixels_are_those_of_the_validation(size):
    """To rounding: the resized pixels are whole numbers, and so is the side before the crop."""
    config = configuration(Network("resnet18", nn.Identity(), 3, MEAN, STD, size))["pretrained_cfg"]
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    steps = np.linspace(0, 255, 90 * 60 * 3)
    image = steps.reshape(90, 60, 3).astype(np.uint8)
    found = timm.data.create_transform(**data)(Image.fromarray(image))
    expected = normalize(CentreView(size)(image)[None])[0]
    assert (found - expected).abs().max() <= 1.5 / 255 / min(STD)


def test_another_network_of_timm_s_loads_from_its_folder(tmp_path):
    """As the description of a network has it: its name, arguments, features and first and last layers."""
    torch.manual_seed(4)
    name, path = "mobilenetv3_small_050", str(tmp_path / "model.safetensors")
    body = timm.create_model(name, num_classes=0, act_layer="relu").eval()
    pretrained = {key: body.pretrained_cfg[key] for key in ("first_conv", "classifier")}
    entries = {
        "architecture": name,
        "model_args": {"act_layer": "relu"},
        "pretrained_cfg": pretrained,
    }
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    network = Network(f"timm/{name}", body, body.head_hidden_size, mean, std, 48, timm=entries)
    beside = companion_files(network, path, "timm")
    assert write(network, {"arch": network.arch}, path, "timm", beside) == ""
    names = dict(timm=timm)
    exec(FORMATS["timm"].load(network, path), names)
    for net in (names["net"], timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        with torch.no_grad():
            assert torch.equal(net.eval()(images(2, 48)), body(images(2, 48)))
    found = timm.data.resolve_model_data_config(net)
    assert (found["input_size"], *map(tuple, (found["mean"], found["std"]))) == (
        [3, 48, 48],
        mean,
        std,
    )
    assert body(images(2, 48)).shape == (2, network.channels)


def test_a_network_that_timm_lacks_has_no_configuration(exported):
    path, report = exported("timm", stem="small")
    assert sorted(os.listdir(os.path.dirname(path))) == ["student.md", "student.safetensors"]
    assert "config.json" not in report


def test_timm_s_configuration_of_another_network_stays_unless_forced(students, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "bert"}')
    arguments = students().path, str(tmp_path / "x.safetensors")
    message, code = refused(*arguments)
    assert (
        message.startswith(f"{config}: exists with other content; ")
        and "--force" in message
    )
    assert code == 2
    assert os.listdir(tmp_path) == ["config.json"] and "bert" in config.read_text()
    main([*arguments, "--force"])
    written = config.read_bytes()
    assert json.loads(written)["architecture"] == "resnet18"
    export(students().path, str(tmp_path / "y.safetensors"))
    assert config.read_bytes() == written


def test_the_weights_take_no_name_of_a_file_beside_them(students, tmp_path):
    message, code = refused(students().path, tmp_path / "config.json", form="timm", force=True)
    assert (
        message
        == f"{tmp_path}/config.json: the name of its companion file; expected another"
    )
    assert code == 2
    assert not list(tmp_path.iterdir())


# Detectron2


def detectron2_names(depth):
    """{Detectron2's name: torchvision's}, written down from the outside: convolution by convolution."""
    blocks, convs = {18: ([2, 2, 2, 2], 2), 50: ([3, 4, 6, 3], 3)}[depth]
    pairs = {"stem.conv1": ("conv1", "bn1")}
    for stage, number in enumerate(blocks, start=1):
        for block in range(number):
            theirs, ours = f"res{stage + 1}.{block}.", f"layer{stage}.{block}."
            pairs |= {
                f"{theirs}conv{i}": (f"{ours}conv{i}", f"{ours}bn{i}") for i in range(1, convs + 1)
            }
            if block == 0 and (stage > 1 or depth >= 50):
                pairs[f"{theirs}shortcut"] = (f"{ours}downsample.0", f"{ours}downsample.1")
    names = {f"{theirs}.weight": f"{conv}.weight" for theirs, (conv, _) in pairs.items()}
    for theirs, (_, norm) in pairs.items():
        names |= {
            f"{theirs}.norm.{kind}": f"{norm}.{kind}"
            for kind in ("weight", "bias", "running_mean", "running_var")
        }
    return names


def detectron2_forward(model, x):
    """A bottleneck ResNet with the stride in its 3x3 convolutions, computed from Detectron2's names: (B, 3, H, W) -> (B, C)."""
    tensors = {name: torch.from_numpy(array) for name, array in model.items()}

    def conv(x, name, stride=1):
        kernel = tensors[f"{name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        norm = [
            tensors[f"{name}.norm.{kind}"]
            for kind in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.batch_norm(x, *norm)

    x = F.max_pool2d(F.relu(conv(x, "stem.conv1", 2)), 3, 2, 1)
    for stage in (2, 3, 4, 5):
        block = 0
        while f"res{stage}.{block}.conv1.weight" in tensors:
            name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            inner = F.relu(conv(F.relu(conv(x, f"{name}.conv1")), f"{name}.conv2", stride))
            shortcut = (
                conv(x, f"{name}.shortcut", stride) if f"{name}.shortcut.weight" in tensors else x
            )
            x = F.relu(conv(inner, f"{name}.conv3") + shortcut)
            block += 1
    return x.mean((2, 3))


def read_pickle(path):
    with open(path, "rb") as file:
        return pickle.load(file)


@pytest.mark.parametrize(("depth", "count"), [(18, 100), (50, 265)])
def test_detectron2_s_names_are_those_of_its_networks(students, exported, depth, count):
    student = students(f"resnet{depth}")
    content = read_pickle(exported("detectron2", f"resnet{depth}")[0])
    assert content["matching_heuristics"] is True
    assert content["__author__"] == content["origin"]["program"]
    model, names = content["model"], detectron2_names(depth)
    assert len(model) == count
    assert model.keys() == names.keys()
    assert all(
        type(array) is np.ndarray and array.dtype == np.float32 and array.flags.writeable
        for array in model.values()
    )
    floats = {
        key: value
        for key, value in student.state.items()
        if not key.endswith("num_batches_tracked")
    }
    assert_same({names[name]: torch.from_numpy(array) for name, array in model.items()}, floats)


def test_a_network_built_from_detectron2_s_names_has_the_features(students, exported):
    model = read_pickle(exported("detectron2", "resnet50")[0])["model"]
    student = students("resnet50")
    with torch.no_grad():
        expected = student.features(images())
        assert (
            detectron2_forward(model, images()) - expected
        ).abs().max() <= 1e-6 * expected.abs().max()


def test_detectron2_s_pickle_stands_on_no_private_names_of_numpy(exported):
    found = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            found.add((module, name))
            return super().find_class(module, name)

    with open(exported("detectron2")[0], "rb") as file:
        assert file.read(2) == b"\x80\x04"
        file.seek(0)
        Unpickler(file).load()
    assert found == {("numpy", "ndarray"), ("builtins", "bytearray")}


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        (
            "resnet18",
            {"DEPTH": 18, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 64},
        ),
        ("resnet50", {"DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64}),
        ("wide_resnet101_2", {"DEPTH": 101, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 128}),
        ("resnext50_32x4d", {"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
    ],
)
def test_detectron2_is_told_what_it_cannot_see(tmp_path, arch, expected):
    with torch.device("meta"):
        net = build_resnet(arch)
    body = SimpleNamespace(state_dict=dict, groups=net.groups, base_width=net.base_width)
    network = Network(arch, body, net.fc.in_features, MEAN, STD, SIZE)
    with open(tmp_path / "x.pkl", "wb") as file:
        detectron2.write(file, network, {"program": "p"})
    options = read_pickle(tmp_path / "x.pkl")["origin"]["detectron2"]
    line = detectron2.load(network, "x.pkl")
    assert eval(line.removeprefix("cfg.merge_from_list")) == ["MODEL.WEIGHTS", "x.pkl", *options]
    options = dict(zip(options[::2], options[1::2], strict=True))
    assert options.pop("INPUT.FORMAT") == "RGB"
    assert options.pop("MODEL.PIXEL_MEAN") == pytest.approx([255 * value for value in MEAN])
    assert options.pop("MODEL.PIXEL_STD") == pytest.approx([255 * value for value in STD])
    assert options == {f"MODEL.RESNETS.{name}": value for name, value in expected.items()} | {
        "MODEL.RESNETS.STRIDE_IN_1X1": False
    }


# ONNX


@pytest.mark.slow
@pytest.mark.parametrize("network", [{}, {"stem": "small"}, {"width": 16}], ids=str)
def test_onnx_s_features_are_the_encoder_s_for_any_batch_and_size(students, exported, network):
    path, report = exported("onnx", **network)
    channels = 8 * network.get("width", 64)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    assert (given.name, given.type) == ("images", "tensor(float)")
    assert given.shape == ["batch", 3, "height", "width"]
    for B, H, W in ((1, SIZE, SIZE), (2, 2 * SIZE, 3 * SIZE + 1), (5, 9, 8), (3, 1, 70)):
        pixels = torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(B))
        (found,) = session.run(["features"], {"images": pixels.numpy()})
        expected = students(**network).features(pixels)
        assert found.shape == (B, channels)
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * expected.abs().max()
    shapes = rf"\(B, 3, H, W\) -> \(B, {channels}\); trained at 32x32"
    assert re.search(shapes + r"; differs from torch's by \S+e-0\d of ", report)
    assert "\n" not in report


@pytest.fixture
def false_onnx(monkeypatch):
    """A function that lets onnxruntime give other features than torch."""

    def replaced(features):
        program = SimpleNamespace(
            model=SimpleNamespace(metadata_props={}), model_proto=SimpleNamespace()
        )
        program.model_proto.SerializeToString = lambda: b"onnx"
        monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **more: program)
        session = SimpleNamespace(run=lambda names, inputs: [features(inputs["images"])])
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *arguments, **more: session)

    return replaced


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e30])
@pytest.mark.parametrize("wrong", ["all", "oblong"])
def test_an_onnx_file_that_computes_something_else_is_removed(
    students, tmp_path, false_onnx, value, wrong
):
    def features(given):
        if wrong == "oblong" and given.shape[2] == given.shape[3]:
            return students().features(torch.from_numpy(given)).numpy()
        return np.full((len(given), 512), value, np.float32)

    false_onnx(features)
    message, code = refused(students().path, tmp_path / "x.onnx")
    assert "differ" in message
    assert code == 1
    assert not list(tmp_path.iterdir())


def test_image_size_is_the_run_s_or_the_one_given(students, tmp_path, false_onnx, monkeypatch):
    sizes = []
    noted = fake_format(lambda file, network, origin: sizes.append(network.size) or "")
    monkeypatch.setitem(FORMATS, "onnx", noted)
    main([students().path, str(tmp_path / "a.onnx")])
    main([students().path, str(tmp_path / "b.onnx"), "--image-size", "48"])
    torch.save({"arch": "resnet18", "state_dict": students().state}, tmp_path / "other.pth.tar")
    main([str(tmp_path / "other.pth.tar"), str(tmp_path / "c.onnx")])
    assert sizes == [SIZE, 48, 224]


@pytest.mark.parametrize("size", ["wide", 4, 5000])
def test_a_file_s_image_size_is_checked(students, tmp_path, size):
    content = {
        "arch": "resnet18",
        "state_dict": students().state,
        "epoch": 1,
        "format": 3,
        "config": {"image_size": size},
    }
    torch.save(content, tmp_path / "other.pth.tar")
    message, code = refused(tmp_path / "other.pth.tar", tmp_path / "x.pth")
    assert message == f"--image-size {size}: expected 8 to 4096. Choose another" and code == 2


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_onnx_without_its_packages_says_what_to_install(students, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message, code = refused(students().path, tmp_path / "x.onnx")
    assert package in message
    assert "pip install '.[onnx]'" in message
    assert code == 2
    assert not list(tmp_path.iterdir())


class OfOneSize(nn.Module):
    """Features of each pixel's place, so that images of another size have none."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * SIZE * SIZE, 5)

    def forward(self, images):
        return self.layer(images.flatten(1))


@pytest.mark.slow
def test_an_onnx_file_of_a_network_of_one_size_has_a_free_batch(tmp_path):
    network = Network("mine", OfOneSize().eval(), 5, MEAN, STD, SIZE, fixed_size=True)
    with open(tmp_path / "x.onnx", "wb") as file:
        assert re.fullmatch(
            r"; differs from torch's by \S+ of the largest feature at most",
            onnx.write(file, network, {}),
        )
    assert onnx.load(network, "x.onnx").endswith("# (B, 3, 32, 32) -> (B, 5); trained at 32x32")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
    for B in (1, 4):
        (found,) = session.run(None, {"images": images(B).numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(found) - network.body(images(B))).abs().max() <= 1e-4


class Branching(nn.Module):
    """A network that computes something else for dark images: torch cannot trace it."""

    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 1 else images.amax((2, 3))


@pytest.mark.slow
def test_a_network_that_torch_cannot_convert_is_one_line(tmp_path):
    network = Network("mine", Branching().eval(), 3, MEAN, STD, SIZE)
    with open(tmp_path / "x.onnx", "wb") as file, pytest.raises(RunError) as caught:
        onnx.write(file, network, {})
    assert str(caught.value).startswith("onnx: mine: torch cannot convert it: ")
    assert str(caught.value).endswith("Use another format") and "\n" not in str(caught.value)
    assert caught.value.code == 1


# The small stem


@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_a_small_stem_s_network_is_told_how_to_hold_it(students, exported, form):
    path, report = exported(form, stem="small")
    note, line = report.split("\n")
    assert "net.conv1 and net.maxpool" in note
    assert SMALL_STEM in line
    assert SMALL_STEM in origin_of(form, path)["note"]
    net = loaded(line)
    net.fc = nn.Identity()
    assert_features(net, students(stem="small"))


def test_detectron2_cannot_hold_a_small_stem(students, tmp_path):
    message, code = refused(students(stem="small").path, tmp_path / "x.pkl")
    assert "small stem" in message
    assert "onnx" in message
    assert code == 2
    assert not list(tmp_path.iterdir())


# Another width


@pytest.mark.parametrize("form", ["torchvision", "timm", "detectron2"])
def test_other_programs_networks_have_the_published_width_alone(students, tmp_path, form):
    message, code = refused(students(width=16).path, tmp_path / f"x{ENDING[form]}")
    assert message == f"{form}'s resnet18 has 64 channels in its first stage, this one 16. Use onnx"
    assert code == 2
    assert not list(tmp_path.iterdir())


# All formats


FORMS = [pytest.param(form, marks=pytest.mark.slow if form == "onnx" else ()) for form in FORMATS]


def origin_of(form, path):
    """Where a file says that it comes from."""
    if form == "torchvision":
        return torch.load(path, weights_only=True).origin
    if form == "detectron2":
        return read_pickle(path)["origin"]
    if form == "timm":
        with safetensors.safe_open(path, framework="pt") as file:
            text = file.metadata()
        assert text.pop("format") == "pt"
    else:
        text = (
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            .get_modelmeta()
            .custom_metadata_map
        )
    return {
        key: json.loads(value)
        if key in ("width", "epoch", "mean", "std", "config", "image_size")
        else value
        for key, value in text.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_file_says_where_it_comes_from_but_not_where_that_lies(students, exported, form):
    student, (path, _) = students(), exported(form)
    origin = origin_of(form, path)
    assert origin.pop("detectron2", None) is None or form == "detectron2"
    assert origin.pop("image_size", SIZE) == SIZE and origin.pop("program").startswith("moco-mgd")
    config = origin.pop("config")
    with open(student.path, "rb") as file:
        sha256 = hashlib.sha256(file.read()).hexdigest()
    expected = {
        "source": "checkpoint_0012_000000.pth.tar",
        "sha256": sha256,
        "arch": "resnet18",
        "stem": "imagenet",
        "width": 64,
    }
    assert origin == expected | {"epoch": 12, "mean": list(MEAN), "std": list(STD)}
    shortened = {
        "data": "birds",
        "out": "mine",
        "teacher": "teacher.pth.tar",
        "config": ["a.yaml", "small"],
    }
    assert config == dataclasses.asdict(student.config) | shortened
    with open(path, "rb") as file:
        assert PRIVATE.encode() not in file.read()


@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_the_report_loads_the_file(students, exported, form):
    path, report = exported(form)
    assert report.startswith(f"wrote {path}: 44.8 MB, resnet18 of epoch 12 for {form}; ")
    assert "\n" not in report
    net = loaded(report)
    net.fc = nn.Identity()
    assert_features(net, students())


@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_an_exported_file_is_a_teacher_s(students, exported, form):
    found = read_backbone(exported(form)[0])
    assert (found.arch, found.stem) == ("resnet18", "imagenet")
    assert_same(found.state, students().state)


def test_other_people_s_files_are_exported_too(tmp_path):
    """Of half precision, tensors that are views, without counters, epochs or options."""
    net = torchvision.models.resnet18()
    half = {
        key: value.half()
        for key, value in net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    half["layer1.0.conv1.weight"] = half["layer1.0.conv1.weight"][:1, :1].expand(64, 64, 3, 3)
    torch.save(half, tmp_path / "theirs.pth")
    report = export(str(tmp_path / "theirs.pth"), str(tmp_path / "x.safetensors"))
    assert "MB, resnet18 for timm" in report
    state = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert all(
        torch.equal(state[key], value.float())
        for key, value in half.items()
        if not key.startswith("fc.")
    )
    origin = origin_of("timm", tmp_path / "x.safetensors")
    assert origin["source"] == "theirs.pth"
    assert origin["epoch"] is None
    assert "config" not in origin


# The command line, and the file's place


@pytest.fixture
def fake_formats(monkeypatch):
    """Writers that write their format's name."""
    for form in FORMATS:

        def write(file, network, origin, form=form):
            file.write(form.encode())
            return ""

        monkeypatch.setitem(FORMATS, form, fake_format(write))


@pytest.mark.parametrize(
    ("name", "form"),
    [*((f"x{ending}", form) for ending, form in ENDINGS.items()), ("a.b.PTH", "torchvision")],
)
def test_the_ending_tells_the_format(students, tmp_path, fake_formats, name, form):
    export(students().path, str(tmp_path / name))
    assert (tmp_path / name).read_text() == form


@pytest.mark.parametrize("name", ["x.onnx", "x.bin", "x"])
def test_a_given_format_counts_whatever_the_ending(students, tmp_path, fake_formats, capsys, name):
    main([students().path, str(tmp_path / name), "--format", "timm"])
    assert (tmp_path / name).read_text() == "timm"
    assert capsys.readouterr().out.count("\n") == 1


def test_the_files_have_these_endings():
    assert ENDINGS == {
        ".pth": "torchvision", ".pt": "torchvision", ".safetensors": "timm", ".pkl": "detectron2", ".onnx": "onnx"
    }  # fmt: skip
    assert list(FORMATS) == ["torchvision", "timm", "detectron2", "onnx"]


@pytest.mark.parametrize("name", ["x", "x.bin", "x.pth.tar", ".pth"])
def test_an_unknown_ending_asks_for_the_format(students, tmp_path, name):
    message, code = refused(students().path, tmp_path / name)
    assert "--format" in message
    assert all(form in message for form in FORMATS)
    assert code == 2


def test_a_file_that_is_there_is_written_over_by_force_alone(students, tmp_path, fake_formats):
    path = tmp_path / "x.pth"
    path.write_text("old")
    message, code = refused(students().path, path)
    assert "--force" in message
    assert code == 2
    assert path.read_text() == "old"
    main([students().path, str(path), "--force"])
    assert path.read_text() == "torchvision"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "x.md", path]


@pytest.mark.parametrize("which", ["path", "link"])
def test_the_checkpoint_itself_is_never_written_over(students, which):
    student = students()
    with open(student.path, "rb") as file:
        before = file.read()
    message, code = refused(student.link, getattr(student, which), form="torchvision", force=True)
    assert "the checkpoint itself" in message
    assert code == 2
    with open(student.path, "rb") as file:
        assert file.read() == before


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("odd")],
)
@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_write_leaves_what_was_there(students, tmp_path, monkeypatch, error, old):
    def interrupted(file, network, origin):
        file.write(b"half")
        file.flush()
        raise error

    monkeypatch.setitem(FORMATS, "torchvision", fake_format(interrupted))
    path = tmp_path / "x.pth"
    if old:
        path.write_text("old")
    expected = RunError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        export(students().path, str(path), force=True)
    if expected is RunError:
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert list(tmp_path.iterdir()) == ([path] if old else [])
    assert not old or path.read_text() == "old"


@pytest.mark.parametrize(
    ("place", "part"),
    [("nowhere/x.pth", "no folder"), ("file/x.pth", "no folder"), ("x.pth", "is there")],
)
def test_a_place_that_cannot_be_written_is_one_line(students, tmp_path, place, part):
    (tmp_path / "file").write_text("")
    (tmp_path / "x.pth").mkdir()
    message, code = refused(students().path, tmp_path / place)
    assert part in message
    assert code == 2


@pytest.mark.parametrize("place", ["/proc/x.pth", "x.pth"])
def test_a_place_that_refuses_the_file_is_one_line(
    students, tmp_path, monkeypatch, fake_formats, place
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").mkdir()
    message, _ = refused(students().path, place, force=True, card=False)
    assert message.startswith(f"cannot write {place}: ")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["CHECKPOINT", "OUTPUT", "--help"]),
        (["{checkpoint}", "x.bin"], ["x.bin", "--format"]),
        (["{checkpoint}", "x.pth", "--format", "caffe"], ["caffe", "torchvision", "onnx"]),
        (["{checkpoint}", "x.onnx", "--image-size", "big"], ["--image-size", "big"]),
        (["{checkpoint}", "x.onnx", "--image-size", "0"], ["--image-size", "0", "at least 8"]),
        (["missing.pth.tar", "x.pth"], ["missing.pth.tar", "no such file"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_line_and_exit_code_two(
    students, tmp_path, monkeypatch, capsys, arguments, parts
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([argument.format(checkpoint=students().path) for argument in arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts)
    assert not list(tmp_path.iterdir())


def test_main_prints_the_report(students, tmp_path, capsys):
    main([students(stem="small").link, str(tmp_path / "x.pth")])
    out, err = capsys.readouterr()
    note, line, end = out.split("\n")
    assert line.startswith(f"wrote {tmp_path / 'x.pth'}: ")
    assert (end, err) == ("", "")
