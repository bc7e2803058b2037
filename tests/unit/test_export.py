"""job.export: files of other programs, their origin, options and errors."""

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
from job.export.network import SMALL_STEM, Network, build_other
from job.export.timm import configuration
from job.checkpoints.folder import Checkpoints
from job.checkpoints.foreign import read_backbone
from job.data.augment import MEAN, STD, CentreView, normalize
from job.networks import ARCHS, Encoder, build_resnet, own
from job.frameworks.moco import build_moco

ENDING = {form: ending for ending, form in reversed(ENDINGS.items())}
SIZE = 32  # of the run's images, in pixels
PRIVATE = "/home/somebody"


class Student:
    """A run's checkpoint of an encoder with random norms, and the encoder's features."""

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
        # By torchvision's names.
        self.state = {
            key: value
            for key, value in self.moco.encoder_q.state_dict().items()
            if not key.startswith("fc.")
        }

    @torch.no_grad()
    def features(self, images):
        """Return the inputs of the head: (B, 3, H, W) -> (B, C)."""
        seen = []
        hook = self.moco.encoder_q.get_submodule("fc.0").register_forward_pre_hook(
            lambda layer, inputs: seen.append(inputs[0])
        )
        self.moco.encoder_q(images)
        hook.remove()
        return seen[0]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A function that returns a Student, built once."""
    made = {}

    def student(*network, **options):
        key = (*network, *options.items())
        if key not in made:
            made[key] = Student(tmp_path_factory.mktemp("run"), *network, **options)
        return made[key]

    return student


@pytest.fixture(scope="module")
def exported(students, tmp_path_factory):
    """A function that returns an exported file's path and the report, exported once."""
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
    """Assert that a loaded network has the features of the checkpoint's encoder."""
    with torch.no_grad():
        assert (net.eval()(images()) - student.features(images())).abs().max() <= tolerance


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def fake_format(write):
    """Return a format with the test's writer."""
    return Format(write, lambda network, path: repr(path))


def refused(*arguments, **more):
    with pytest.raises(RunError) as caught:
        export(*map(str, arguments), **more)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.code


def loaded(report):
    """Return the network that the report's statements load."""
    names = dict(torch=torch, torchvision=torchvision, timm=timm, safetensors=safetensors)
    exec(report.split("load it with: ")[1], names)
    return names["net"]


# torchvision


def test_torchvision_misses_only_the_head(students, exported):
    path, _ = exported("torchvision")
    state = torch.load(path, weights_only=True)
    assert all(type(key) is str and torch.is_tensor(value) for key, value in state.items())
    assert_same(state, students().state)
    net = torchvision.models.resnet18()
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    net.fc = nn.Identity()
    assert_features(net, students())


def test_torchvision_file_survives_saving(exported, tmp_path):
    path, _ = exported("torchvision")
    state = torch.load(path, weights_only=True, mmap=True)
    torch.save(state, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same(again, state)
    assert again.origin == state.origin


# timm


def test_timm_loads_every_tensor(students, exported):
    path, _ = exported("timm")
    state = safetensors.torch.load_file(path)
    assert_same(state, students().state)
    net = timm.create_model("resnet18", num_classes=0)
    net.load_state_dict(state, strict=True)
    assert_features(net, students())
    assert_features(timm.create_model("resnet18", num_classes=0, checkpoint_path=path), students())


@pytest.mark.parametrize("arch", ARCHS)
def test_timm_names_equal_torchvision_s(arch):
    with torch.device("meta"):
        theirs, ours = (
            timm.create_model(arch, num_classes=0).state_dict(),
            build_resnet(arch).state_dict(),
        )
    expected = {key: value.shape for key, value in ours.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in theirs.items()} == expected


@pytest.mark.parametrize("name", ["model.safetensors", "student.safetensors"])
def test_timm_builds_from_its_folder(students, tmp_path, name):
    report = export(students().path, str(tmp_path / name))
    assert "for timm, with config.json" in report
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(net.state_dict(), students().state)
    assert_features(net, students())
    assert net.num_classes == 0
    actual = timm.data.resolve_model_data_config(net)
    expected = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD, "crop_pct": 0.875}
    assert {
        key: tuple(value) if isinstance(value, list) else value for key, value in actual.items()
    } == expected | {
        "interpolation": "bilinear",
        "crop_mode": "center",
    }
    with_head = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=10)
    assert torch.equal(with_head.layer4[1].bn2.bias, students().state["layer4.1.bn2.bias"])
    assert with_head.fc.weight.shape == (10, 512)


@pytest.mark.parametrize("name", ["x.bin", "x.SAFETENSORS"])
def test_report_loads_timm_of_any_ending(students, tmp_path, name):
    report = export(students().path, str(tmp_path / name), "timm")
    assert_features(loaded(report), students())
    assert "local-dir" not in (tmp_path / "x.md").read_text()


def test_timm_configuration_equals_timm_s_own(students, tmp_path):
    export(students("resnet50").path, str(tmp_path / "model.safetensors"))
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    timm.models.save_for_hf(net, tmp_path / "again", safe_serialization=True)
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path, tmp_path / "again")
    )
    assert ours["num_features"] == 2048
    for actual, expected in (
        (ours.pop("pretrained_cfg"), theirs.pop("pretrained_cfg")),
        (ours, theirs),
    ):
        assert actual and {key: expected[key] for key in actual} == actual


@pytest.mark.parametrize("size", [56, 224])
def test_timm_pixels_are_the_validation_s(size):
    """They differ by rounding: resized pixels and the side before the crop are integers."""
    config = configuration(Network("resnet18", nn.Identity(), 3, MEAN, STD, size))["pretrained_cfg"]
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    steps = np.linspace(0, 255, 90 * 60 * 3)
    image = steps.reshape(90, 60, 3).astype(np.uint8)
    actual = timm.data.create_transform(**data)(Image.fromarray(image))
    expected = normalize(CentreView(size)(image)[None])[0]
    assert (actual - expected).abs().max() <= 1.5 / 255 / min(STD)


def test_timm_network_loads_from_its_folder(tmp_path):
    """A network with its own name, arguments, features, first and last layers."""
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
    companions = companion_files(network, path, "timm")
    assert write(network, {"arch": network.arch}, path, "timm", companions) == ""
    names = dict(timm=timm)
    exec(FORMATS["timm"].load(network, path), names)
    for net in (names["net"], timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        with torch.no_grad():
            assert torch.equal(net.eval()(images(2, 48)), body(images(2, 48)))
    actual = timm.data.resolve_model_data_config(net)
    assert (actual["input_size"], *map(tuple, (actual["mean"], actual["std"]))) == (
        [3, 48, 48],
        mean,
        std,
    )
    assert body(images(2, 48)).shape == (2, network.channels)


def test_timm_configuration_needs_timm_s_network(exported):
    path, report = exported("timm", stem="small")
    assert sorted(os.listdir(os.path.dirname(path))) == ["student.md", "student.safetensors"]
    assert "config.json" not in report


def test_timm_configuration_is_kept_unless_forced(students, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "bert"}')
    arguments = students().path, str(tmp_path / "x.safetensors")
    message, code = refused(*arguments)
    assert message.startswith(f"{config}: exists with other content; ") and "--force" in message
    assert code == 2
    assert os.listdir(tmp_path) == ["config.json"] and "bert" in config.read_text()
    main([*arguments, "--force"])
    written = config.read_bytes()
    assert json.loads(written)["architecture"] == "resnet18"
    export(students().path, str(tmp_path / "y.safetensors"))
    assert config.read_bytes() == written


def test_weights_refuse_a_companion_s_name(students, tmp_path):
    message, code = refused(students().path, tmp_path / "config.json", form="timm", force=True)
    problem = f"{tmp_path}/config.json is another file of this export; expected another name"
    assert message == f"{tmp_path}/config.json: {problem}"
    assert code == 2
    assert not list(tmp_path.iterdir())


# Detectron2


def detectron2_names(depth):
    """Return {Detectron2's name: torchvision's}, listed by convolutions."""
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
    """Compute a bottleneck ResNet by Detectron2's names, stride in 3x3: (B, 3, H, W) -> (B, C)."""
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
def test_detectron2_names_match_its_networks(students, exported, depth, count):
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


def test_detectron2_network_has_the_features(students, exported):
    model = read_pickle(exported("detectron2", "resnet50")[0])["model"]
    student = students("resnet50")
    with torch.no_grad():
        expected = student.features(images())
        assert (
            detectron2_forward(model, images()) - expected
        ).abs().max() <= 1e-6 * expected.abs().max()


def test_detectron2_pickle_is_portable(exported):
    classes = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            classes.add((module, name))
            return super().find_class(module, name)

    with open(exported("detectron2")[0], "rb") as file:
        assert file.read(2) == b"\x80\x04"
        file.seek(0)
        Unpickler(file).load()
    assert classes == {("numpy", "ndarray"), ("builtins", "bytearray")}


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
def test_detectron2_options_complete_the_file(tmp_path, arch, expected):
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
@pytest.mark.parametrize("network", [{}, {"stem": "small", "width": 16}], ids=str)
@pytest.mark.short
def test_onnx_features_equal_the_encoder_s(students, exported, network):
    path, report = exported("onnx", **network)
    channels = 8 * network.get("width", 64)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    assert (given.name, given.type) == ("images", "tensor(float)")
    assert given.shape == ["batch", 3, "height", "width"]
    for B, H, W in ((1, SIZE, SIZE), (2, 2 * SIZE, 3 * SIZE + 1), (5, 9, 8), (3, 1, 70)):
        pixels = torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(B))
        (actual,) = session.run(["features"], {"images": pixels.numpy()})
        expected = students(**network).features(pixels)
        assert actual.shape == (B, channels)
        assert (torch.from_numpy(actual) - expected).abs().max() <= 1e-4 * expected.abs().max()
    shapes = rf"\(B, 3, H, W\) -> \(B, {channels}\); trained at 32x32"
    assert re.search(shapes + r"; differs from torch's by \S+e-0\d of ", report)
    assert "\n" not in report


@pytest.fixture
def false_onnx(monkeypatch):
    """A function that replaces onnxruntime's features."""

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
def test_onnx_file_that_differs_is_removed(students, tmp_path, false_onnx, value, wrong):
    def features(given):
        if wrong == "oblong" and given.shape[2] == given.shape[3]:
            return students().features(torch.from_numpy(given)).numpy()
        return np.full((len(given), 512), value, np.float32)

    false_onnx(features)
    message, code = refused(students().path, tmp_path / "x.onnx")
    assert "differ" in message
    assert code == 1
    assert not list(tmp_path.iterdir())


def test_image_size_is_the_run_s_or_the_option_s(students, tmp_path, false_onnx, monkeypatch):
    sizes = []
    noted = fake_format(lambda file, network, origin: sizes.append(network.size) or "")
    monkeypatch.setitem(FORMATS, "onnx", noted)
    main([students().path, str(tmp_path / "a.onnx")])
    main([students().path, str(tmp_path / "b.onnx"), "--image-size", "48"])
    torch.save({"arch": "resnet18", "state_dict": students().state}, tmp_path / "other.pth.tar")
    main([str(tmp_path / "other.pth.tar"), str(tmp_path / "c.onnx")])
    assert sizes == [SIZE, 48, 224]


@pytest.mark.parametrize("size", ["wide", 4, 5000])
def test_image_size_of_a_file_is_checked(students, tmp_path, size):
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
def test_onnx_without_packages_names_them(students, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message, code = refused(students().path, tmp_path / "x.onnx")
    assert package in message
    assert "pip install '.[onnx]'" in message
    assert code == 2
    assert not list(tmp_path.iterdir())


class OfOneSize(nn.Module):
    """Features by positions of pixels, so that the size is fixed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * SIZE * SIZE, 5)

    def forward(self, images):
        return self.layer(images.flatten(1))


@pytest.mark.slow
def test_onnx_of_one_size_has_a_free_batch(tmp_path):
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
        (actual,) = session.run(None, {"images": images(B).numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(actual) - network.body(images(B))).abs().max() <= 1e-4


class InRows(nn.Module):
    def forward(self, images):
        return images.view(-1, 3 * 32 * 32)


class AnySize(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("body", "channels", "fixed"),
    [
        (OfOneSize(), 5, True),
        (InRows(), 3 * 32 * 32, True),
        (nn.Flatten(), 3 * 32 * 32, True),
        (AnySize(), 3, False),
    ],
)
def test_fixed_size_of_a_user_s_network_is_detected(body, channels, fixed):
    net = Encoder(body, own.own_pass, nn.Linear(channels, 2), {}, channels_last=True)
    weights = SimpleNamespace(arch="mine:Net", image_size=0, mean=MEAN, std=STD)
    weights.build = lambda size: net
    assert build_other(weights, SIZE).fixed_size == fixed


class Branching(nn.Module):
    """A network with a branch for dark images, which torch cannot trace."""

    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 1 else images.amax((2, 3))


@pytest.mark.slow
def test_onnx_conversion_failure_is_one_line(tmp_path):
    network = Network("mine", Branching().eval(), 3, MEAN, STD, SIZE)
    with open(tmp_path / "x.onnx", "wb") as file, pytest.raises(RunError) as caught:
        onnx.write(file, network, {})
    assert str(caught.value).startswith("onnx: mine: torch cannot convert it: ")
    assert str(caught.value).endswith("Use another format") and "\n" not in str(caught.value)
    assert caught.value.code == 1


# The small stem


@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_small_stem_statement_loads_the_file(students, exported, form):
    path, report = exported(form, stem="small")
    note, line = report.split("\n")
    assert "net.conv1 and net.maxpool" in note
    assert SMALL_STEM in line
    assert SMALL_STEM in origin_of(form, path)["note"]
    net = loaded(line)
    net.fc = nn.Identity()
    assert_features(net, students(stem="small"))


def test_detectron2_refuses_the_small_stem(students, tmp_path):
    message, code = refused(students(stem="small").path, tmp_path / "x.pkl")
    assert "small stem" in message
    assert "onnx" in message
    assert code == 2
    assert not list(tmp_path.iterdir())


# Another width


@pytest.mark.parametrize("form", ["torchvision", "timm", "detectron2"])
def test_formats_refuse_other_widths(students, tmp_path, form):
    message, code = refused(students(width=16).path, tmp_path / f"x{ENDING[form]}")
    assert (
        message
        == f"{form}'s resnet18 has 64 channels in its first stage, this one 16. Choose OUTPUT.onnx"
    )
    assert code == 2
    assert not list(tmp_path.iterdir())


# All formats


FORMS = [pytest.param(form, marks=pytest.mark.slow if form == "onnx" else ()) for form in FORMATS]


def origin_of(form, path):
    """Return the origin in a file."""
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
def test_origin_has_no_folders(students, exported, form):
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
def test_report_loads_the_file(students, exported, form):
    path, report = exported(form)
    assert report.startswith(f"wrote {path}: 44.8 MB, resnet18 of epoch 12 for {form}, with ")
    assert "\n" not in report
    net = loaded(report)
    net.fc = nn.Identity()
    assert_features(net, students())


@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_exported_file_is_a_teacher(students, exported, form):
    backbone = read_backbone(exported(form)[0])
    assert (backbone.arch, backbone.stem) == ("resnet18", "imagenet")
    assert_same(backbone.state, students().state)


def test_foreign_checkpoints_are_exported(tmp_path):
    """They have half precision and tensors that are views, but no counters, epochs and options."""
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


# The command line, and the output's path


@pytest.fixture
def fake_formats(monkeypatch):
    """Replace the writers: each writes its format's name."""
    for form in FORMATS:

        def write(file, network, origin, form=form):
            file.write(form.encode())
            return ""

        monkeypatch.setitem(FORMATS, form, fake_format(write))


@pytest.mark.parametrize(
    ("name", "form"),
    [*((f"x{ending}", form) for ending, form in ENDINGS.items()), ("a.b.PTH", "torchvision")],
)
def test_ending_decides_the_format(students, tmp_path, fake_formats, name, form):
    export(students().path, str(tmp_path / name))
    assert (tmp_path / name).read_text() == form


@pytest.mark.parametrize("name", ["x.onnx", "x.bin", "x"])
def test_format_option_overrides_the_ending(students, tmp_path, fake_formats, capsys, name):
    main([students().path, str(tmp_path / name), "--format", "timm"])
    assert (tmp_path / name).read_text() == "timm"
    assert capsys.readouterr().out.count("\n") == 1


def test_endings_are_complete():
    assert ENDINGS == {
        ".pth": "torchvision", ".pt": "torchvision", ".safetensors": "timm",
        ".pkl": "detectron2", ".onnx": "onnx",
    }  # fmt: skip
    assert list(FORMATS) == ["torchvision", "timm", "detectron2", "onnx"]


@pytest.mark.parametrize("name", ["x", "x.bin", "x.pth.tar", ".pth"])
def test_ending_unknown_is_refused(students, tmp_path, name):
    message, code = refused(students().path, tmp_path / name)
    assert "--format" in message
    assert all(form in message for form in FORMATS)
    assert code == 2


def test_output_is_overwritten_only_by_force(students, tmp_path, fake_formats):
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
def test_output_refuses_the_checkpoint(students, which):
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
def test_output_is_kept_if_interrupted(students, tmp_path, monkeypatch, error, old):
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
    ("output", "part"),
    [("nowhere/x.pth", "no folder"), ("file/x.pth", "no folder"), ("x.pth", "exists")],
)
def test_output_refuses_unwritable_paths(students, tmp_path, output, part):
    (tmp_path / "file").write_text("")
    (tmp_path / "x.pth").mkdir()
    message, code = refused(students().path, tmp_path / output)
    assert part in message
    assert code == 2


@pytest.mark.parametrize("output", ["/proc/x.pth", "x.pth"])
def test_output_failure_is_one_line(students, tmp_path, monkeypatch, fake_formats, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").mkdir()
    message, _ = refused(students().path, output, force=True, card=False)
    assert message.startswith(f"cannot write {output}: ")
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
def test_main_mistakes_are_one_line(students, tmp_path, monkeypatch, capsys, arguments, parts):
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
