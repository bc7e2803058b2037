"""Networks of timm: names, features compared with timm's own, and refusals."""

import copy
import functools
import sys

import pytest
import timm
import torch
from torch import nn

from errors import refused
from job.cluster import comm
from job.frameworks.moco import build_moco
from job.networks import build_network, network_outline, stage_norms, timm_networks, with_features
from job.networks.layout import is_unsafe
from job.networks.probe import same

MOBILE, VIT, NEXT, RES = (
    f"timm/{name}" for name in ("mobilenetv3_small_050", "test_vit", "test_convnext", "test_resnet")
)
STAGES = [1, 2, 3, 4]
SIZE = 32
MAPS = {  # (C, H, W) of each stage for images of 32 pixels, by timm's feature_info
    MOBILE: {1: (8, 8, 8), 2: (16, 4, 4), 3: (24, 2, 2), 4: (288, 1, 1)},
    VIT: dict.fromkeys(STAGES, (64, 2, 2)),  # blocks 1, 3, 4 and 6 of 6
    RES: {1: (32, 8, 8), 2: (48, 4, 4), 3: (192, 2, 2), 4: (96, 1, 1)},
}
INDICES = {MOBILE: [1, 2, 3, 4], VIT: [0, 2, 3, 5], RES: [1, 2, 3, 4]}  # of timm's maps
POOLED = {MOBILE: 1024, VIT: 64, NEXT: 64, RES: 96}


def images(B=2, size=SIZE):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1))


@functools.cache
def net(arch, **options):
    torch.manual_seed(0)
    return build_network(arch, dim=8, mlp=True, image_size=SIZE, **options).eval()


def of_timm(arch, state):
    """Return timm's own network with the same tensors."""
    size = {"img_size": SIZE} if arch == VIT else {}
    plain = timm.create_model(arch.removeprefix("timm/"), num_classes=0, **size).eval()
    plain.load_state_dict(state)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("arch", MAPS)
def test_features_equal_timm_s(arch):
    ours = net(arch)
    plain = of_timm(arch, ours.body.state_dict())
    maps = plain.forward_intermediates(images(), intermediates_only=True)
    actual = with_features(ours, STAGES)(images())
    assert list(actual) == ["layer1", "layer2", "layer3", "layer4", "pooled", "fc"]
    for stage, index in zip(STAGES, INDICES[arch], strict=True):
        assert torch.equal(actual[f"layer{stage}"], maps[index])
    pooled = plain(images())
    assert torch.equal(actual["pooled"], pooled) and torch.equal(actual["fc"], ours.fc(pooled))
    assert torch.equal(ours(images()), actual["fc"])


@torch.no_grad()
@pytest.mark.parametrize("arch", POOLED)
def test_outline_has_the_features_sizes(arch):
    outline = network_outline(arch, "imagenet", 64, SIZE)
    actual = with_features(net(arch), STAGES, output="flatten")(images())
    assert outline.pooled == actual["flatten"].shape[1] == POOLED[arch]
    shapes = {stage: tuple(actual[f"layer{stage}"].shape[1:]) for stage in outline.maps}
    assert outline.maps == shapes == MAPS.get(arch, shapes)
    assert outline.widths == {stage: C for stage, (C, _, _) in shapes.items()} | {
        "pooled": POOLED[arch]
    }


@torch.no_grad()
def test_features_are_available_one_by_one():
    ours = net(MOBILE)
    assert list(with_features(ours, [2], None)(images())) == ["layer2"]
    assert list(with_features(ours, [4], None)(images())) == ["layer4", "pooled"]
    assert list(with_features(ours, [], "flatten")(images())) == ["flatten"]
    assert not any(name.startswith("fc.") for name in with_features(ours, [4], None).state_dict())


def test_state_has_moco_s_names():
    """Readers of checkpoints expect the head as `fc` behind `module.encoder_q`."""
    state = build_moco(comm, VIT, dim=8, K=6, mlp=True, stages=[4], image_size=SIZE).state_dict()
    starts = {".".join(name.split(".")[:2]) for name in state}
    encoders = ("encoder_q", "encoder_k")
    assert starts == {"queue", "queue_ptr"} | {
        f"{e}.{part}" for e in encoders for part in ("body", "fc")
    }
    body = {name for name in state if name.startswith("encoder_q.body.")}
    assert {name.removeprefix("encoder_q.body.") for name in body} == set(
        of_timm(VIT, net(VIT).body.state_dict()).state_dict()
    )
    for name in state:
        if name.startswith("encoder_q."):
            assert torch.equal(state[name], state[name.replace("encoder_q", "encoder_k")]), name


def test_training_draws_no_random_numbers(monkeypatch):
    """Dropout and stochastic depth are off, so that a resumed run computes the same bytes."""
    create = timm_networks.create
    more = {"drop_rate": 0.5, "drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5}
    monkeypatch.setattr(
        timm_networks, "create", lambda *args, **options: create(*args, **options, **more)
    )
    body = timm_networks.build_body(VIT, SIZE).train()
    generator = torch.get_rng_state()
    assert torch.equal(body(images()), body(images()))
    assert torch.equal(torch.get_rng_state(), generator)
    monkeypatch.setattr(timm_networks, "build_body", timm_networks.create)
    assert not torch.equal(
        *(timm_networks.build_body(VIT, SIZE).train()(images()) for _ in range(2))
    )


def test_probe_draws_no_random_numbers():
    generator = torch.get_rng_state()
    network_outline("timm/test_efficientnet", "imagenet", 64, SIZE)
    assert torch.equal(torch.get_rng_state(), generator)


def test_gradients_reach_all_parameters():
    for arch in (MOBILE, VIT, NEXT):
        trained = copy.deepcopy(net(arch)).train()
        with_features(trained, STAGES)(images(4))["fc"].square().sum().backward()
        assert all(value.grad is not None for value in trained.parameters())


@torch.no_grad()
def test_probe_without_gradients_still_trains():
    seen = build_network("timm/test_byobnet", image_size=SIZE)
    assert all(value.requires_grad for value in seen.parameters())


def test_stage_norms_precede_the_shortcut():
    """MobileNetV3's last stage ends in an activation, and so do all of timm's ResNets."""
    norms, body = stage_norms(net(MOBILE)), net(MOBILE).body
    expected = {1: body.blocks[0][-1], 2: body.blocks[1][-1], 3: body.blocks[3][-1]}
    assert list(norms) == [1, 2, 3]
    for stage, block in expected.items():
        last = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        assert norms[stage] is last and last.num_features == MAPS[MOBILE][stage][0]
    assert not any(stage_norms(net(arch)) for arch in (RES, VIT, NEXT))


@torch.no_grad()
def test_stage_norm_matches_the_maps():
    """In train mode, each channel's mean before the shortcut is the norm's bias."""
    arch = "timm/mobilenetv2_050"
    torch.manual_seed(0)
    body = copy.deepcopy(build_network(arch, image_size=SIZE))
    norms = stage_norms(body)
    assert list(norms) == STAGES
    for norm in norms.values():
        norm.bias.uniform_(1, 2)
    seen = {}
    for stage, norm in norms.items():
        norm.register_forward_hook(
            lambda _, __, output, stage=stage: seen.update({stage: output.mean((0, 2, 3))})
        )
    with_features(body.train(), STAGES)(images(8))
    for stage, norm in norms.items():
        torch.testing.assert_close(seen[stage], norm.bias, rtol=1e-3, atol=1e-3)


REFUSED = {
    "timm/mobilenetv3_smal_050": ("no network of timm", "did you mean timm/mobilenetv3_small_050?"),
    "timm/resnet18.a1_in2k": ("no weights a1_in2k of resnet18 in timm", "did you mean a1_in1k?"),
    "timm/vit_tiny_patch16_224.zz": ("expected one of augreg_in21k",),
    "mobilenetv3_small_050": ("did you mean timm/mobilenetv3_small_050?",),
    "resnet81": ("did you mean resnet18?",),
    "qqqqqqqq": ("expected one of resnet18,", "timm/NAME or package.module:function"),
    "timm/": ("no network of timm",),
}


@pytest.mark.parametrize("arch", REFUSED)
def test_unknown_name_suggests_the_nearest(arch):
    from job.networks import check_name

    message = refused(check_name, arch, "--arch")
    assert message.startswith(f"--arch '{arch}': ")
    for part in REFUSED[arch]:
        assert part in message


def test_missing_timm_names_the_command(monkeypatch):
    from job.networks import check_name

    monkeypatch.setitem(sys.modules, "timm", None)
    assert refused(check_name, MOBILE, "-a") == f"-a {MOBILE} needs timm: pip install '.[timm]'"
    assert "expected one of resnet18," in refused(check_name, "mobilenetv3", "-a")


@pytest.mark.parametrize(("arch", "size"), [(VIT, 8), ("timm/test_maxvit", 50)])
def test_refused_size_is_one_line(arch, size):
    message = refused(build_network, arch, image_size=size)
    assert message.startswith(f"{arch} cannot process {size} x {size} pixels: ")
    assert message.endswith(". Choose another --image-size")


def test_network_without_maps_is_pooled(monkeypatch):
    monkeypatch.setattr(timm_networks, "find_pass", lambda body: timm_networks.TimmPass({4: 99}))
    outline = network_outline("timm/test_mambaout", "imagenet", 64, SIZE)
    assert outline.maps == {} and outline.pooled > 9
    actual = with_features(build_network("timm/test_mambaout", image_size=SIZE), STAGES)(images())
    assert list(actual) == ["pooled", "fc"] and actual["pooled"].shape == (2, outline.pooled)


def test_network_has_no_stride_that_overruns_memory():
    """RepVGG's first block has a strided 1x1 convolution of 3 channels."""
    assert not any(map(is_unsafe, build_network("timm/repvgg_a0", image_size=SIZE).modules()))


@pytest.mark.parametrize("scale", [1, 1e11])
def test_rounding_is_no_other_computation(scale):
    features = scale * torch.linspace(-1, 1, 7)[None]
    noise = 1e-4 * scale * torch.tensor([1.0, -1] * 3 + [1])
    assert same(features, features + noise)
    assert not same(features, features + 100 * noise)
    assert not same(features, features[:, :6])
