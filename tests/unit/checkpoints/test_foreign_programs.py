"""Checkpoints of other programs, with the tensor names in their public sources."""

from typing import NamedTuple

import pytest
import torch
from tests.unit.checkpoints.test_foreign import assert_same, body, filled, refused, shapes
from torchvision import models

from job.checkpoints.foreign import read_backbone
from job.networks import build_resnet

NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
WITHOUT_POOLING = {
    "conv1": "0",
    "bn1": "1",
    "layer1": "3",
    "layer2": "4",
    "layer3": "5",
    "layer4": "6",
}


def resnet(seed=0, stem="imagenet"):
    return filled(shapes(build_resnet, "resnet18", 1000, False, stem), seed)


def named(prefix, seed=0, head=False, first=None, **options):
    """Return a ResNet-18 after a prefix. first: new names of its children."""
    tensors = resnet(seed, **options)
    renamed = {}
    for key, value in (tensors if head else body(tensors)).items():
        child, dot, rest = key.partition(".")
        renamed[prefix + (first or {}).get(child, child) + dot + rest] = value
    return renamed


def shortcut(tensors):
    return {key.replace("downsample", "shortcut"): value for key, value in tensors.items()}


def extra(*keys):
    return dict.fromkeys(keys, torch.ones(2, 2))


class Program(NamedTuple):
    """A program's file. The network to load has seed 0, the others seed 1."""

    content: dict
    under: str
    left: str = ""
    stem: str = "imagenet"


# The sources of the names are comments: repository, file.
PROGRAMS = {
    # facebookresearch/moco-v3, moco/builder.py
    "moco v3": Program(
        {
            "epoch": 100,
            "arch": "resnet18",
            "state_dict": named("module.base_encoder.")
            | extra("module.base_encoder.fc.0.weight", "module.predictor.0.weight")
            | named("module.momentum_encoder.", 1),
        },
        "module.base_encoder.",
        "state_dict.module.momentum_encoder",
    ),
    # facebookresearch/dino, main_dino.py. Its authors evaluate the teacher (its issue 44).
    "dino": Program(
        {
            "student": named("module.backbone.", 1) | extra("module.head.mlp.0.weight"),
            "teacher": named("module.backbone.") | extra("module.head.mlp.0.weight"),
            "optimizer": {
                "state": {0: {"momentum_buffer": torch.ones(3)}},
                "param_groups": [{"lr": 0.1}],
            },
            "epoch": 100,
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        "module.backbone.",
        "student.module.backbone",
    ),
    # facebookresearch/barlowtwins, main.py, and facebookresearch/vicreg, main_vicreg.py
    "barlow twins, vicreg": Program(
        {
            "epoch": 5,
            "model": named("module.backbone.")
            | extra("module.projector.0.weight", "module.bn.running_mean"),
            "optimizer": {"state": {0: {"mu": torch.ones(3)}}, "param_groups": []},
        },
        "module.backbone.",
    ),
    "barlow twins, vicreg, released": Program(named(""), ""),
    # facebookresearch/deepcluster and swav have the names of DistributedDataParallel
    "deepcluster v2": Program(
        named("module.")
        | extra("module.projection_head.0.weight", "module.prototypes.prototypes0.weight"),
        "module.",
    ),
    # facebookresearch/vissl, extra_scripts/convert_vissl_to_torchvision.py and
    # vissl/models/trunks/resnext.py
    "vissl": Program(
        {
            "phase_idx": 99,
            "classy_state_dict": {
                "train": True,
                "base_model": {
                    "model": {"trunk": named("_feature_blocks."), "heads": extra("0.clf.0.weight")},
                    "meta": {},
                },
                "optimizer": {"optim": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
            },
        },
        "_feature_blocks.",
    ),
    "vissl, released": Program({"model_state_dict": named("_feature_blocks.")}, "_feature_blocks."),
    # open-mmlab/mmselfsup (formerly OpenSelfSup), mmselfsup/models/algorithms/moco.py
    "mmselfsup moco": Program(
        {
            "meta": {"epoch": 200},
            "state_dict": extra("queue", "queue_ptr")
            | named("encoder_q.0.")
            | extra("encoder_q.1.mlp.0.weight")
            | named("encoder_k.0.", 1)
            | named("backbone.")
            | extra("neck.mlp.0.weight"),
        },
        "backbone.",
        "state_dict.encoder_q.0, state_dict.encoder_k.0",
    ),
    # open-mmlab/mmpretrain, mmpretrain/models/selfsup/byol.py
    "mmpretrain byol": Program(
        {
            "meta": {},
            "state_dict": named("backbone.")
            | extra("neck.fc0.weight")
            | named("target_net.module.0.", 1),
        },
        "backbone.",
        "state_dict.target_net.module.0",
    ),
    "mmpretrain classifier": Program(
        {"meta": {}, "state_dict": named("backbone.") | extra("head.fc.weight")}, "backbone."
    ),
    # lucidrains/byol-pytorch, byol_pytorch/byol_pytorch.py
    "byol-pytorch": Program(
        named("net.", head=True)
        | named("online_encoder.net.", head=True)
        | extra("online_encoder.projector.0.weight")
        | named("target_encoder.net.", 1, head=True),
        "net.",
        "online_encoder.net, target_encoder.net",
    ),
    # sthalles/PyTorch-BYOL, trainer.py and models/resnet_base_network.py
    "PyTorch-BYOL": Program(
        {
            "online_network_state_dict": named("encoder.", first=NUMBERS)
            | extra("projetion.net.0.weight"),
            "target_network_state_dict": named("encoder.", 1, first=NUMBERS)
            | extra("projetion.net.0.weight"),
            "optimizer_state_dict": {"state": {}, "param_groups": []},
        },
        "encoder.",
        "target_network_state_dict.encoder",
    ),
    # Lightning-Universe/lightning-bolts, pl_bolts/models/self_supervised/byol/models.py
    "bolts byol": Program(
        {
            "epoch": 3,
            "pytorch-lightning_version": "1.5.0",
            "state_dict": named("online_network.encoder.", head=True)
            | extra("online_network.projector.model.0.weight")
            | named("target_network.encoder.", 1, head=True),
        },
        "online_network.encoder.",
        "state_dict.target_network.encoder",
    ),
    # Lightning-Universe/lightning-bolts, pl_bolts/models/self_supervised/moco/moco2_module.py
    "bolts moco": Program(
        {
            "epoch": 3,
            "state_dict": extra("queue", "queue_ptr", "val_queue")
            | named("encoder_q.", head=True)
            | named("encoder_k.", 1, head=True),
        },
        "encoder_q.",
        "state_dict.encoder_k",
    ),
    # lightly-ai/lightly, benchmarks/imagenet/resnet50/dino.py: the teacher is called backbone
    "lightly dino": Program(
        {
            "state_dict": named("backbone.")
            | named("student_backbone.", 1)
            | extra("online_classifier.linear.weight")
        },
        "backbone.",
        "state_dict.student_backbone",
    ),
    # sthalles/SimCLR, models/resnet_simclr.py
    "SimCLR of sthalles": Program(
        {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": named("backbone.") | extra("backbone.fc.0.weight"),
        },
        "backbone.",
    ),
    # leftthomas/SimCLR, model.py and main.py, where a profiler leaves counters in the modules
    "SimCLR of leftthomas": Program(
        named("f.", first=NUMBERS)
        | extra("g.0.weight", "total_ops", "f.total_ops", "f.4.0.total_params"),
        "f.",
    ),
    "SimCLR of leftthomas, small": Program(
        named("f.", first=WITHOUT_POOLING, stem="small") | extra("g.0.weight"), "f.", stem="small"
    ),
    # HobbitLong/SupContrast, networks/resnet_big.py
    "SupContrast": Program(
        {
            "opt": {},
            "model": shortcut(named("encoder.module.", stem="small")) | extra("head.0.weight"),
            "epoch": 1,
        },
        "encoder.module.",
        stem="small",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_program_s_network_is_read(tmp_path, program):
    torch.save(program.content, tmp_path / "weights")
    backbone = read_backbone(str(tmp_path / "weights"))
    assert_same(backbone.state, body(resnet(stem=program.stem)))
    assert (backbone.arch, backbone.stem) == ("resnet18", program.stem)
    under = f" under {program.under}*" if program.under else ""
    assert f"120 tensors{under} loaded" in backbone.report
    left = backbone.report.partition("; other networks in the file: ")[2]
    assert left == program.left


@pytest.mark.parametrize(
    ("prefix", "nest"),
    [
        ("_orig_mod.", lambda state: state),
        ("module._orig_mod.", lambda state: {"state_dict": state}),
        ("_orig_mod.module.", lambda state: {"model_state_dict": state}),
        ("model.any_name._orig_mod.module.net.", lambda state: {"a": {"b": {"network": state}}}),
    ],
)
def test_wrappers_are_removed_at_any_depth(tmp_path, prefix, nest):
    torch.save(nest(named(prefix, head=True)), tmp_path / "weights")
    backbone = read_backbone(str(tmp_path / "weights"))
    assert_same(backbone.state, body(resnet()))
    assert backbone.head == "linear 512-1000"


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
)
def test_wrappers_of_layers_are_removed(tmp_path, wrapper):
    layers = ("conv1", "bn1", "layer1", "layer3")
    torch.save(
        named("module.", first={layer: f"{layer}.{wrapper}"[:-1] for layer in layers}),
        tmp_path / "weights",
    )
    assert_same(read_backbone(str(tmp_path / "weights")).state, body(resnet()))


def test_wrappers_of_torch_are_removed(tmp_path):
    net = models.resnet18()
    wrapped = torch.nn.DataParallel(
        torch.compile(torch.nn.ModuleDict({"encoder": torch.compile(net)}))
    )
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "weights")
    assert_same(read_backbone(str(tmp_path / "weights")).state, body(net.state_dict()))


@pytest.mark.parametrize(
    "key", ["layer1.0.conv1.weight", "conv1.weight", "layer2.0.downsample.0.weight"]
)
def test_missing_tensor_in_nested_dictionary_is_named(tmp_path, key):
    program = PROGRAMS["vissl"]
    trunk = dict(program.content["classy_state_dict"]["base_model"]["model"]["trunk"])
    del trunk[f"_feature_blocks.{key}"]
    torch.save(
        {"classy_state_dict": {"base_model": {"model": {"trunk": trunk}}}}, tmp_path / "weights"
    )
    assert f"_feature_blocks.{key} is missing" in refused(str(tmp_path / "weights"))


def test_deep_stem_is_refused(tmp_path):
    tensors = named("", head=True, first={"conv1": "conv1.0"}) | extra("conv1.3.weight")
    torch.save(tensors, tmp_path / "weights")
    message = refused(str(tmp_path / "weights"))
    assert "fits no ResNet (resnet18 is the nearest): conv1.weight is missing; " in message
    assert "conv1.0.weight is unexpected" in message


def test_error_shows_nested_keys(tmp_path):
    vit = {
        "patch_embed.proj.weight": torch.ones(2, 3, 16, 16),
        "blocks.0.attn.qkv.weight": torch.ones(2, 2),
    }
    content = {
        "epoch": 3,
        "args": {"lr": 0.1},
        "networks": {"teacher": {"ema": vit}},
        5: None,
        "more": 1,
        "\n" * 99: 2,
    }
    torch.save(content, tmp_path / "weights")
    message = refused(str(tmp_path / "weights"))
    assert "holds no ResNet" in message
    networks = "'networks': {'teacher': {'ema': {'patch_embed.proj"
    assert "found {'epoch': int, 'args': {'lr': float}, " + networks in message
    ending = "'blocks.0.attn.qkv.weight': a tensor (2, 2)}}}, 'int': NoneType, 2 more}"
    fix = "use another file, or name its network, as --teacher-arch timm/NAME"
    assert message.endswith(f"{ending}: {fix}")


def test_outline_of_long_file_is_short(tmp_path):
    content = {
        f"{'name' * 99}{n}": {f"{'key' * 99}{n}": torch.ones(2) for n in range(30)}
        for n in range(30)
    }
    torch.save(content, tmp_path / "weights")
    assert len(refused(str(tmp_path / "weights"))) < 800
