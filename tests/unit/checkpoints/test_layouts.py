"""Layouts of public checkpoints, with the names and shapes of their releases."""

from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tests.unit.checkpoints.test_foreign import assert_same, body, filled, refused, shapes
from torch import nn
from torchvision import models

from job.checkpoints.foreign import read_backbone
from job.networks import build_resnet


def headless(arch, stem="imagenet"):
    net = build_resnet(arch, stem=stem)
    net.fc = nn.Identity()
    return net


def hidden(before, after, bias=False):
    return nn.Linear(before, after, bias=bias), nn.BatchNorm1d(after), nn.ReLU()


def module(**children):
    """Return modules with the names that DistributedDataParallel gives them."""
    return nn.ModuleDict({"module": nn.ModuleDict(children)})


def moco(arch, mlp, wrapped=True):
    net = nn.ModuleDict({name: build_resnet(arch, 128, mlp) for name in ("encoder_q", "encoder_k")})
    net.register_buffer("queue", torch.zeros(128, 64))
    net.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    return nn.ModuleDict({"module": net}) if wrapped else net


def simsiam():
    net = models.resnet50(num_classes=2048)
    net.fc = nn.Sequential(
        *hidden(2048, 2048), *hidden(2048, 2048), net.fc, nn.BatchNorm1d(2048, affine=False)
    )
    return module(encoder=net, predictor=nn.Sequential(*hidden(2048, 512), nn.Linear(512, 2048)))


def swav():
    net = headless("resnet50")
    net.projection_head = nn.Sequential(*hidden(2048, 2048, bias=True), nn.Linear(2048, 128))
    net.prototypes = nn.Linear(128, 3000, bias=False)
    return nn.ModuleDict({"module": net})


def solo_learn(stem, name="backbone"):
    net = nn.ModuleDict()
    for copy in ("", "momentum_"):
        net[copy + name] = headless("resnet18", stem)
        net[copy + "projector"] = nn.Sequential(*hidden(512, 2048, bias=True), nn.Linear(2048, 256))
    net["classifier"] = nn.Linear(512, 100)
    net.register_buffer("queue", torch.zeros(2, 256, 64))
    return net


def lightly(numbered):
    net = nn.ModuleDict()
    for copy in ("", "_momentum"):
        trunk = headless("resnet18")
        net["backbone" + copy] = nn.Sequential(*list(trunk.children())[:-1]) if numbered else trunk
        layers = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
        net["projection_head" + copy] = nn.ModuleDict({"layers": layers})
    return net


def torchvision(arch, wrapped=False):
    net = getattr(models, arch)()
    return nn.ModuleDict({"module": net}) if wrapped else net


def released(tensors):
    return {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": tensors,
        "optimizer": {"state": {}, "param_groups": []},
    }


def lightning(tensors):
    callback = {
        "monitor": None,
        "best_model_score": torch.tensor(0.5),
        "best_model_path": "",
        "kth_value": torch.tensor(0.5),
    }
    return {
        "epoch": 399,
        "global_step": 78000,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": tensors,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": callback},
        "optimizer_states": [
            {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.3}]}
        ],
        "lr_schedulers": [],
        "hparams_name": "cfg",
        "hyper_parameters": {"method": "byol", "optimizer": {"lr": 0.3}},
    }


def under(name):
    return lambda tensors: {name: tensors}


def bare(tensors):
    return tensors


class Format(NamedTuple):
    """A file format, and the facts that must be detected."""

    where: str  # the dictionary of the tensors in the file
    net: tuple  # a function that builds it, and its arguments
    # makes the file's content from its tensors, or is a metadata dict for safetensors
    content: object
    arch: str
    stem: str
    prefix: str
    head: str
    ignored: str
    layer3: str = "layer3"


SOLO_LEARN = "9 of projector, 9 of momentum_projector, 2 of classifier, 1 other"
FORMATS = {
    "moco v1": Format(
        "state_dict",
        (moco, "resnet50", False),
        released,
        "resnet50",
        "imagenet",
        "module.encoder_q.",
        "linear 2048-128",
        "320 of encoder_k, 2 of fc, 2 others",
    ),
    "moco v2": Format(
        "state_dict",
        (moco, "resnet50", True),
        released,
        "resnet50",
        "imagenet",
        "module.encoder_q.",
        "mlp 2048-2048-128",
        "322 of encoder_k, 4 of fc, 2 others",
    ),
    "moco unwrapped": Format(
        "state_dict",
        (moco, "resnet18", True, False),
        under("state_dict"),
        "resnet18",
        "imagenet",
        "encoder_q.",
        "mlp 512-512-128",
        "124 of encoder_k, 4 of fc, 2 others",
    ),
    "moco safetensors": Format(
        "state_dict",
        (moco, "resnet18", True),
        {"arch": "resnet18"},
        "resnet18",
        "imagenet",
        "module.encoder_q.",
        "mlp 512-512-128",
        "124 of encoder_k, 4 of fc, 2 others",
    ),
    "simsiam": Format(
        "state_dict",
        (simsiam,),
        released,
        "resnet50",
        "imagenet",
        "module.encoder.",
        "mlp 2048-2048-2048-2048",
        "17 of fc, 8 of predictor",
    ),
    "swav": Format(
        "",
        (swav,),
        bare,
        "resnet50",
        "imagenet",
        "module.",
        "mlp 2048-2048-128",
        "9 of projection_head, 1 of prototypes",
    ),
    "solo-learn": Format(
        "state_dict",
        (solo_learn, "imagenet"),
        lightning,
        "resnet18",
        "imagenet",
        "backbone.",
        "mlp 512-2048-256",
        f"120 of momentum_backbone, {SOLO_LEARN}",
    ),
    "solo-learn cifar": Format(
        "state_dict",
        (solo_learn, "small"),
        lightning,
        "resnet18",
        "small",
        "backbone.",
        "mlp 512-2048-256",
        f"120 of momentum_backbone, {SOLO_LEARN}",
    ),
    "solo-learn older": Format(
        "state_dict",
        (solo_learn, "small", "encoder"),
        lightning,
        "resnet18",
        "small",
        "encoder.",
        "mlp 512-2048-256",
        f"120 of momentum_encoder, {SOLO_LEARN}",
    ),
    "lightly": Format(
        "state_dict",
        (lightly, False),
        lightning,
        "resnet18",
        "imagenet",
        "backbone.",
        "mlp 512-512-128",
        "120 of backbone_momentum, 4 of projection_head, 4 of projection_head_momentum",
    ),
    "lightly numbered": Format(
        "state_dict",
        (lightly, True),
        lightning,
        "resnet18",
        "imagenet",
        "backbone.",
        "mlp 512-512-128",
        "120 of backbone_momentum, 4 of projection_head, 4 of projection_head_momentum",
        "6",
    ),
    "torchvision": Format(
        "",
        (torchvision, "resnet34"),
        bare,
        "resnet34",
        "imagenet",
        "",
        "linear 512-1000",
        "2 of fc",
    ),
    "torchvision model": Format(
        "model",
        (torchvision, "resnet18"),
        under("model"),
        "resnet18",
        "imagenet",
        "",
        "linear 512-1000",
        "2 of fc",
    ),
    "torchvision wrapped": Format(
        "state_dict",
        (torchvision, "resnet50", True),
        under("state_dict"),
        "resnet50",
        "imagenet",
        "module.",
        "linear 2048-1000",
        "2 of fc",
    ),
    "timm safetensors": Format(
        "state_dict",
        (torchvision, "resnet18"),
        {"format": "pt"},
        "resnet18",
        "imagenet",
        "",
        "linear 512-1000",
        "2 of fc",
    ),
    "headless": Format(
        "",
        (headless, "resnet50"),
        bare,
        "resnet50",
        "imagenet",
        "",
        "none",
        "nothing",
    ),
}
each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def write(folder, form, tensors):
    """Write a file of this format, and return its path."""
    path = folder / "weights"
    if isinstance(form.content, dict):
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, form.content)
    else:
        torch.save(form.content(tensors), path)
    return str(path)


def tensors_of(form):
    return filled(shapes(*form.net))


@each_format
def test_format_is_read(tmp_path, form):
    tensors = tensors_of(form)
    path = write(tmp_path, form, tensors)
    backbone = read_backbone(path)
    names = list(body(shapes(build_resnet, form.arch, 16, False, form.stem)))
    # A body precedes its head.
    own = [value for key, value in tensors.items() if key.startswith(form.prefix)]
    assert (backbone.arch, backbone.stem, backbone.head) == (form.arch, form.stem, form.head)
    assert_same(backbone.state, dict(zip(names, own, strict=False)))
    assert "\n" not in backbone.report
    layers = "named layers" if form.layer3 == "layer3" else "numbered layers"
    layout = f"{layers} in {form.where}" if form.where else layers
    for text in (path, f"(layout: {layout})", f"{len(names)} tensors", form.prefix):
        assert text in backbone.report
    ignored = f"not needed, so ignored: {form.ignored} (head: {form.head})"
    assert f"loaded, none missing; {ignored}" in backbone.report
    build_resnet(backbone.arch, stem=backbone.stem).load_state_dict(backbone.state, strict=False)


@each_format
@pytest.mark.parametrize("arch", ["", "its own"])
def test_format_with_renamed_tensor_is_refused(tmp_path, form, arch):
    start = f"{form.prefix}{form.layer3}.0."
    tensors = {
        key.replace(f"{start}conv1", f"{start}conv9"): value
        for key, value in tensors_of(form).items()
    }
    message = refused(write(tmp_path, form, tensors), arch and form.arch)
    assert f"{start}conv1.weight is missing; {start}conv9.weight is unexpected" in message
    assert form.arch in message


@each_format
def test_format_with_wrong_shape_is_refused(tmp_path, form):
    tensors = tensors_of(form)
    name = f"{form.prefix}{form.layer3}.0.bn2.weight"
    expected = tuple(tensors[name].shape)
    tensors[name] = torch.ones(7)
    assert f"{name} is (7,), expected {expected}" in refused(write(tmp_path, form, tensors))


@each_format
def test_format_with_nan_is_refused(tmp_path, form):
    tensors = tensors_of(form)
    name = f"{form.prefix}{form.layer3}.1.bn2.running_var"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    message = refused(write(tmp_path, form, tensors))
    assert name in message
    assert "not finite" in message


@pytest.mark.parametrize("name", ["prototype.weight", "layer5.0.conv1.weight", "queue"])
def test_unexpected_tensor_is_refused(tmp_path, name):
    form = FORMATS["swav"]
    message = refused(write(tmp_path, form, tensors_of(form) | {f"module.{name}": torch.ones(3)}))
    assert f"module.{name} is unexpected" in message


@pytest.mark.parametrize(
    ("loaded", "left"),
    [
        ("module.base_encoder.", "module.momentum_encoder."),
        ("online_network.encoder.", "target_network.encoder."),
        ("backbone.", "backbone_momentum."),
        ("teacher_backbone.", "student_backbone."),
        ("net.", "net_ema."),
    ],
)
def test_copies_are_not_loaded(tmp_path, loaded, left):
    net = shapes(torchvision, "resnet18")
    copies = {left: filled(net, 0), loaded: filled(net, 1)}
    state = {
        prefix + key: value for prefix, tensors in copies.items() for key, value in tensors.items()
    }
    torch.save({"state_dict": state}, tmp_path / "weights")
    backbone = read_backbone(str(tmp_path / "weights"))
    assert_same(backbone.state, body(copies[loaded]))
    assert f" under {loaded}* " in backbone.report
    assert backbone.report.endswith(
        f"; other networks in the file: state_dict.{left.removesuffix('.')}"
    )


def distilled(tmp_path):
    """Write a file with a ResNet-18 and its teacher, a ResNet-34. Return their tensors."""
    networks = {
        "student": filled(shapes(torchvision, "resnet18"), 0),
        "teacher": filled(shapes(torchvision, "resnet34"), 1),
    }
    state = {
        f"{prefix}.{key}": value
        for prefix, tensors in networks.items()
        for key, value in tensors.items()
    }
    torch.save({"state_dict": state}, tmp_path / "weights")
    return networks


def test_student_of_other_shape_is_loaded(tmp_path):
    """If both have the same shape, as in DINO, the student is the copy."""
    networks = distilled(tmp_path)
    assert_same(read_backbone(str(tmp_path / "weights")).state, body(networks["student"]))


def test_network_of_given_arch_is_loaded(tmp_path):
    networks = distilled(tmp_path)
    backbone = read_backbone(str(tmp_path / "weights"), "resnet34")
    assert_same(backbone.state, body(networks["teacher"]))
    assert backbone.report.endswith("; other networks in the file: state_dict.student")


def test_layer_with_and_without_wrapper_is_refused(tmp_path):
    net = filled(shapes(torchvision, "resnet18"), 0)
    torch.save(
        net | {f"_orig_mod.{key}": value + 1 for key, value in net.items()}, tmp_path / "weights"
    )
    assert "occurs twice, with and without a wrapper's name" in refused(str(tmp_path / "weights"))


def test_first_prefix_is_loaded(tmp_path):
    prefixes = [
        "module.encoder_q.",
        "encoder_q.",
        "module.encoder.",
        "backbone.",
        "encoder.",
        "module.",
        "",
    ]
    net = shapes(torchvision, "resnet18")
    copies = {prefix: filled(net, seed) for seed, prefix in enumerate(reversed(prefixes))}
    for prefix in prefixes:
        content = {
            start + key: value
            for start, tensors in copies.items()
            for key, value in tensors.items()
        }
        torch.save({"state_dict": content}, tmp_path / "weights")
        backbone = read_backbone(str(tmp_path / "weights"))
        assert_same(backbone.state, body(copies.pop(prefix)))
        assert not prefix or f" under {prefix}* " in backbone.report


def test_first_of_equal_networks_is_loaded(tmp_path):
    net = shapes(torchvision, "resnet18")
    copies = {"right.": filled(net, 0), "left.": filled(net, 1)}
    torch.save(
        {prefix + key: value for prefix, state in copies.items() for key, value in state.items()},
        tmp_path / "weights",
    )
    assert_same(read_backbone(str(tmp_path / "weights")).state, body(copies["right."]))


@pytest.mark.parametrize(
    "keys", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("state_dict", "other")]
)
def test_first_dictionary_is_loaded(tmp_path, keys):
    net = shapes(torchvision, "resnet18")
    content = {key: filled(net, seed) for seed, key in enumerate(reversed(keys))}
    torch.save(content, tmp_path / "weights")
    assert_same(read_backbone(str(tmp_path / "weights")).state, body(content[keys[0]]))


@pytest.mark.parametrize("prefix", ["momentum_backbone.", "module.encoder_k.", "student."])
def test_copy_without_original_is_loaded(tmp_path, prefix):
    tensors = filled(shapes(torchvision, "resnet18"))
    torch.save(
        {"state_dict": {prefix + key: value for key, value in tensors.items()}},
        tmp_path / "weights",
    )
    backbone = read_backbone(str(tmp_path / "weights"))
    assert_same(backbone.state, body(tensors))
    assert f" under {prefix}* " in backbone.report


@pytest.mark.parametrize(
    ("layers", "head"),
    [
        ([nn.Linear(512, 10)], "linear 512-10"),
        ([nn.Linear(512, width, bias=False) for width in [512] * 11], "mlp 512" + "-512" * 11),
        (
            [nn.Linear(512 - done, 511 - done) for done in range(12)],
            "mlp " + "-".join(str(512 - n) for n in range(13)),
        ),
        ([nn.Linear(512, 10), nn.Linear(512, 10)], "other"),
        ([nn.BatchNorm1d(512)], "none"),
    ],
    ids=["linear", "equal", "twelve", "side by side", "no matrix"],
)
def test_head_widths_are_in_layer_order(tmp_path, layers, head):
    tensors = (
        filled(shapes(headless, "resnet18"))
        | nn.ModuleDict({"fc": nn.Sequential(*layers)}).state_dict()
    )
    torch.save({key: tensors[key] for key in sorted(tensors)}, tmp_path / "weights")
    assert read_backbone(str(tmp_path / "weights")).head == head


@pytest.mark.parametrize(
    ("more", "epoch", "config"),
    [
        ({}, None, {}),
        ({"epoch": 200}, 200, {}),
        ({"epoch": 3, "format": 1, "config": {"image_size": 32}}, 3, {"image_size": 32}),
        ({"epoch": 3, "config": {"image_size": 32}}, 3, {}),
        ({"epoch": True, "format": 1, "config": [1]}, None, {}),
        ({"epoch": "200", "format": 1}, None, {}),
    ],
    ids=str,
)
def test_meta_has_epoch_and_own_options(tmp_path, more, epoch, config):
    torch.save({"state_dict": filled(shapes(moco, "resnet18", True)), **more}, tmp_path / "weights")
    assert read_backbone(str(tmp_path / "weights")).meta == {"epoch": epoch, "config": config}


def test_safetensors_with_wrong_arch_are_refused(tmp_path):
    form = FORMATS["timm safetensors"]._replace(content={"arch": "resnet34"})
    assert "does not fit resnet34" in refused(write(tmp_path, form, tensors_of(form)))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights"])
def test_safetensors_are_detected_by_content(tmp_path, name):
    tensors = {
        key: value.contiguous() for key, value in filled(shapes(headless, "resnet18")).items()
    }
    save_file(tensors, tmp_path / name)
    assert_same(read_backbone(str(tmp_path / name)).state, tensors)


def test_half_precision_is_read(tmp_path):
    tensors = filled(shapes(torchvision, "resnet18"))
    halved = {
        key: value.to(torch.bfloat16 if value.is_floating_point() else value.dtype)
        for key, value in tensors.items()
    }
    torch.save(halved, tmp_path / "weights")
    assert_same(read_backbone(str(tmp_path / "weights")).state, body(halved))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:100],
        lambda data: data[:9],
        lambda data: data[:5],
        lambda data: data[:9] + b"\xff\n" * 5000,
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: (10**8).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"F32"', b'"X32"', 1),
        lambda data: (2).to_bytes(8, "little") + b"{}",
    ],
    ids=["a byte", "half", "header", "brace", "length", "garbage", "huge", "long", "type", "empty"],
)
def test_incomplete_safetensors_are_refused(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    save_file({"conv1.weight": torch.ones(64, 3, 7, 7), "bn1.weight": torch.ones(64)}, path)
    path.write_bytes(damage(path.read_bytes()))
    refused(str(path))
