"""ResNets, their features and heads, and MoCo's encoders."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from job.cluster import comm
from job.networks import (
    ARCHS,
    DEPTH,
    STEMS,
    build_resnet,
    fold_norms,
    stage_norms,
    stage_sides,
    to_channels_last,
    with_features,
)
from moco.model import update_by_momentum
from job.frameworks.moco import build_moco
from job.networks.layout import make_safe

STAGES = [1, 2, 3, 4]


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def pair(request):
    """torchvision's network and ours with the same weights and random batch norms."""
    torch.manual_seed(0)
    plain = getattr(models, request.param)(num_classes=16)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = build_resnet(request.param, dim=16)
    ours.load_state_dict(plain.state_dict())
    return plain.eval(), ours.eval()


def images(B=2, size=33):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1))


def block_sum(block, x):
    """Return one residual block up to the sum before its last ReLU."""
    y = F.relu(block.bn1(block.conv1(x)))
    y = block.bn2(block.conv2(y))
    if isinstance(block, models.resnet.Bottleneck):
        y = block.bn3(block.conv3(F.relu(y)))
    return y + (x if block.downsample is None else block.downsample(x))


def sums_before_relu(net, x):
    """Return each stage's last sum of torchvision's network, and its pooled features."""
    x = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 3, stride=2, padding=1)
    sums = {}
    for stage in STAGES:
        for block in getattr(net, f"layer{stage}"):
            sums[stage] = block_sum(block, x)
            x = F.relu(sums[stage])
    return sums, x.mean((2, 3))


@torch.no_grad()
def test_features_are_the_stages_sums(pair):
    plain, ours = pair
    actual = with_features(ours, STAGES)(images())
    expected, _ = sums_before_relu(plain, images())
    for stage in STAGES:
        assert torch.equal(actual[f"layer{stage}"], expected[stage])
        assert actual[f"layer{stage}"].min() < 0
    assert list(actual) == ["layer1", "layer2", "layer3", "layer4", "fc"]


def test_features_add_in_place():
    traced = with_features(build_resnet("resnet18"), STAGES)
    for graph in (traced.train_graph, traced.eval_graph):
        sums = [node.target for node in graph.nodes if "add" in node.name]
        assert sums == [operator.iadd] * 8


@torch.no_grad()
def test_features_keep_outputs_bit_equal(pair):
    plain, ours = pair
    expected = plain(images())
    assert torch.equal(ours(images()), expected)
    assert torch.equal(with_features(ours, STAGES)(images())["fc"], expected)
    assert torch.equal(with_features(ours, [])(images())["fc"], expected)


@torch.no_grad()
def test_features_are_computed_if_requested(pair):
    plain, ours = pair
    expected, pooled = sums_before_relu(plain, images())
    flat = with_features(ours, [], output="flatten")(images())
    assert list(flat) == ["flatten"]
    torch.testing.assert_close(flat["flatten"], pooled)
    maps = with_features(ours, [2, 3], output=None)(images())
    assert list(maps) == ["layer2", "layer3"]
    assert torch.equal(maps["layer2"], expected[2])


@torch.no_grad()
@pytest.mark.parametrize("arch, stem", [("resnet18", "imagenet"), ("resnet50", "small")])
def test_fold_norms_keeps_features_to_rounding(arch, stem):
    """Statistics and weights are random, in float64, whose rounding is far smaller."""
    torch.manual_seed(3)
    net = build_resnet(arch, stem=stem).double().eval()
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.1)
    inputs = images().double()
    expected = {name: value.clone() for name, value in with_features(net, STAGES)(inputs).items()}
    folded = with_features(fold_norms(net), STAGES)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    for name, value in folded(inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_features_train_to_the_same_bytes():
    torch.manual_seed(0)
    plain, ours = models.resnet18(num_classes=8), build_resnet("resnet18", dim=8)
    ours.load_state_dict(plain.state_dict())
    extractor = with_features(ours, STAGES).train()
    actual, expected = extractor(images()), plain(images())
    assert torch.equal(actual["fc"], expected)
    assert all(actual[f"layer{stage}"].min() < 0 for stage in STAGES)
    # An error if a ReLU has overwritten its input.
    sum(f.square().mean() for f in actual.values()).backward()
    for (name, mine), theirs in zip(
        ours.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def moco_shapes(arch, dim, mlp):
    """Return names and shapes of MoCo's encoder: torchvision's, with an MLP a hidden layer more."""
    with torch.device("meta"):
        expected = shapes(getattr(models, arch)(num_classes=dim).state_dict())
    if mlp:
        width = expected.pop("fc.weight")[1]
        del expected["fc.bias"]
        expected |= {
            "fc.0.weight": (width, width),
            "fc.0.bias": (width,),
            "fc.2.weight": (dim, width),
            "fc.2.bias": (dim,),
        }
    return expected


@pytest.mark.parametrize("arch", ARCHS)
def test_resnet_names_and_shapes_are_moco_s(arch):
    expected = moco_shapes(arch, 128, mlp=True)
    with torch.device("meta"):
        net = build_resnet(arch, dim=128, mlp=True)
    for actual in (shapes(net.state_dict()), shapes(with_features(net, STAGES).state_dict())):
        assert actual == expected
        assert list(actual) == list(expected)


@pytest.mark.parametrize("stages", [[], [4], STAGES])
@pytest.mark.parametrize("mlp", [False, True])
def test_features_do_not_change_names(stages, mlp):
    with torch.device("meta"):
        net = build_resnet("resnet50", dim=32, mlp=mlp)
    assert list(shapes(with_features(net, stages).state_dict()).items()) == list(
        moco_shapes("resnet50", 32, mlp).items()
    )


def test_head_has_one_hidden_layer():
    torch.manual_seed(0)
    net = build_resnet("resnet18", dim=8, mlp=True).eval()
    with torch.no_grad():
        actual = with_features(net, [4])(images())["fc"]
        pooled = with_features(net, [], output="flatten")(images())["flatten"]
    first, last = net.fc[0], net.fc[2]
    hidden = (pooled @ first.weight.T + first.bias).clamp_min(0)
    torch.testing.assert_close(actual, hidden @ last.weight.T + last.bias)
    assert actual.shape == (2, 8)


def test_features_share_the_parameters():
    net = build_resnet("resnet18", dim=8)
    extractor = with_features(net, [1, 4])
    for (name, mine), (other, theirs) in zip(
        extractor.named_parameters(), net.named_parameters(), strict=True
    ):
        assert name == other
        assert mine is theirs


@torch.no_grad()
def test_small_stem_keeps_the_resolution():
    torch.manual_seed(0)
    net = build_resnet("resnet18", dim=8, stem="small").eval()
    actual = with_features(net, STAGES)(images(size=32))
    assert [tuple(actual[f"layer{stage}"].shape[1:]) for stage in STAGES] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
    ]
    assert net.conv1.weight.shape == (64, 3, 3, 3)
    assert net.conv1.bias is None
    assert shapes(net.state_dict()) == moco_shapes("resnet18", 8, mlp=False) | {
        "conv1.weight": (64, 3, 3, 3)
    }
    actual = F.relu(actual["layer4"]).mean((2, 3)) @ net.fc.weight.T + net.fc.bias
    torch.testing.assert_close(net(images(size=32)), actual)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_zero_init_residual_is_the_identity(arch):
    net = build_resnet(arch, zero_init_residual=True).eval()
    last = f"bn{2 if arch == 'resnet18' else 3}.weight"
    zeros = {
        name
        for name, value in net.named_parameters()
        if not value.any() and name.endswith("weight")
    }
    assert zeros == {
        name
        for name, _ in net.named_parameters()
        if name.startswith("layer") and name.endswith(last)
    }
    block, maps = (
        net.get_submodule("layer3.1"),
        torch.rand(2, 64 * 4 * (1 if arch == "resnet18" else 4), 3, 3),
    )
    assert torch.equal(block(maps), maps)


WIDE = [
    ("resnet18", 16, 1),
    ("resnet50", 16, 4),
    ("resnet18", 96, 1),
    ("resnext50_32x4d", 32, 4),
    ("wide_resnet50_2", 16, 4),
]


@torch.no_grad()
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize(("arch", "width", "expansion"), WIDE)
def test_width_scales_all_channels(arch, width, expansion, stem):
    with torch.device("meta"):
        net = build_resnet(arch, dim=8, mlp=True, stem=stem, width=width).eval()
        published = shapes(build_resnet(arch, dim=8, mlp=True, stem=stem).state_dict())
    scaled = {
        name: tuple(n * width // 64 if n % 64 == 0 else n for n in shape)
        for name, shape in published.items()
    }
    ours = shapes(net.state_dict())
    grouped = {
        name
        for name in ours
        if arch == "resnext50_32x4d" and len(ours[name]) == 4 and ours[name][2:] == (3, 3)
    }
    assert {name: ours[name] for name in ours.keys() - grouped} == {
        name: scaled[name] for name in scaled.keys() - grouped
    }
    batch = images(size=32).to("meta")
    assert net(batch).shape == (2, 8)
    actual = with_features(net, STAGES)(batch)
    assert [actual[f"layer{stage}"].shape[1] for stage in STAGES] == [
        width * expansion << stage for stage in range(DEPTH)
    ]
    assert [norm.num_features for norm in stage_norms(net).values()] == [
        width * expansion << stage for stage in range(DEPTH)
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_width_minimum_fits_every_network(arch):
    with torch.device("meta"):
        net = build_resnet(arch, width=16)
    assert net.bn1.num_features == 16


def test_width_keeps_the_initialisation():
    torch.manual_seed(0)
    net = build_resnet("resnet18", width=128, zero_init_residual=True)
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (
                torch.all(module.weight == (0 if name.endswith("bn2") else 1))
                and not module.bias.any()
            )


def test_small_stem_is_initialised_as_torchvision():
    torch.manual_seed(0)
    weight = build_resnet("resnet18", stem="small").conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("arch", "last"),
    [("resnet18", "bn2"), ("resnet34", "bn2"), ("resnet50", "bn3"), ("resnext50_32x4d", "bn3")],
)
def test_stage_norms_are_the_last_norms(arch, last):
    with torch.device("meta"):
        net = build_resnet(arch)
    norms = stage_norms(net)
    widths = [64, 128, 256, 512] if last == "bn2" else [256, 512, 1024, 2048]
    assert list(norms) == STAGES == list(range(1, DEPTH + 1))
    for stage, width in zip(STAGES, widths, strict=True):
        assert norms[stage] is getattr(net.get_submodule(f"layer{stage}")[-1], last)
        assert norms[stage].num_features == width


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2))


def resnet():
    return build_resnet("resnet18", dim=8, mlp=True)


def resnet_with_features():
    return with_features(resnet(), [2, 4])


@pytest.mark.parametrize(
    ("build_key", "build_query", "momentum"),
    [(small_net, small_net, m) for m in (0.999, 0.5, 0.0, 1.0)]
    + [(resnet, resnet_with_features, 0.9)],
)
def test_momentum_update_equals_a_loop(build_key, build_query, momentum):
    torch.manual_seed(0)
    key, query = build_key(), build_query()
    for buffer in query.buffers():
        buffer.fill_(7)
    named, state = (
        dict(query.named_parameters()),
        {name: value.clone() for name, value in key.state_dict().items()},
    )
    untouched = {name: value.clone() for name, value in query.state_dict().items()}
    update_by_momentum(key, query, momentum)
    for name, value in key.state_dict().items():
        if name in named:
            expected = (
                momentum * state[name].double() + (1 - momentum) * named[name].detach().double()
            )
            torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, state[name]), name
    assert all(torch.equal(value, untouched[name]) for name, value in query.state_dict().items())


@pytest.fixture(scope="module")
def moco():
    torch.manual_seed(0)
    return build_moco(comm, "resnet18", dim=16, K=40, mlp=True, stages=[2, 4])


@pytest.mark.parametrize(
    ("arch", "mlp", "stages"),
    [("resnet18", True, STAGES), ("resnet50", True, []), ("resnet50", False, [4])],
)
def test_state_has_the_released_names(arch, mlp, stages):
    with torch.device("meta"):
        state = build_moco(comm, arch, dim=128, K=96, mlp=mlp, stages=stages).state_dict()
    encoder = moco_shapes(arch, 128, mlp)
    expected = {"module.queue": (128, 96), "module.queue_ptr": (1,)}
    for name in ("encoder_q", "encoder_k"):
        expected |= {f"module.{name}.{key}": shape for key, shape in encoder.items()}
    actual = {f"module.{name}": shape for name, shape in shapes(state).items()}
    assert actual == expected
    assert list(actual) == list(expected)


def test_state_has_some_names_literally(moco):
    names = [f"module.{name}" for name in moco.state_dict()]
    assert names[:4] == [
        "module.queue",
        "module.queue_ptr",
        "module.encoder_q.conv1.weight",
        "module.encoder_q.bn1.weight",
    ]
    assert names[-4:] == [
        f"module.encoder_k.fc.{layer}.{x}" for layer in (0, 2) for x in ("weight", "bias")
    ]
    for encoder in ("encoder_q", "encoder_k"):
        assert f"module.{encoder}.layer1.0.bn2.num_batches_tracked" in names
        assert f"module.{encoder}.layer4.0.downsample.1.running_var" in names
    assert len(names) == 2 + 2 * (122 + 2)  # 122 of ResNet-18, and the hidden layer


def test_queue_starts_normalised(moco):
    assert moco.queue.shape == (16, 40)
    torch.testing.assert_close(moco.queue.norm(dim=0), torch.ones(40))
    assert not torch.equal(moco.queue[:, 0], moco.queue[:, 1])
    assert moco.queue_ptr.dtype == torch.int64
    assert moco.queue_ptr.tolist() == [0]


def test_key_encoder_starts_equal_and_frozen(moco):
    query, key = moco.encoder_q.state_dict(), moco.encoder_k.state_dict()
    assert all(torch.equal(query[name], key[name]) for name in key)
    assert not any(p.requires_grad for p in moco.encoder_k.parameters())
    assert all(p.requires_grad for p in moco.encoder_q.parameters())
    shared = {p.data_ptr() for p in moco.encoder_q.parameters()} & {
        p.data_ptr() for p in moco.encoder_k.parameters()
    }
    assert not shared


def test_moco_defaults_are_published():
    with torch.device("meta"):
        net = build_moco(comm, "resnet18")
    assert (net.m, net.T, tuple(net.queue.shape)) == (0.999, 0.07, (128, 65536))


def test_keys_enter_at_the_pointer():
    net = build_moco(comm, "resnet18", dim=4, K=6)
    keys = torch.arange(16.0).view(4, 4)
    net.enqueue(keys)
    net.enqueue(keys + 100)
    assert torch.equal(net.queue[:, [4, 5, 0, 1]], keys.T + 100)
    assert torch.equal(net.queue[:, [2, 3]], keys[2:].T)
    assert net.queue_ptr.tolist() == [2]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stem_pooling_first_keeps_maps_and_gradients(layout, dtype):
    torch.manual_seed(0)
    plain, ours = models.resnet18(), build_resnet("resnet18")
    maps = torch.randn(2, 64, 17, 18).to(dtype).contiguous(memory_format=layout)
    maps[:, :8] = -1  # ties, and maxima that the ReLU stops
    results = []
    for net in (plain, ours):
        inputs = maps.clone(memory_format=torch.preserve_format).requires_grad_()
        pooled = net.maxpool(net.relu(inputs * 1))
        (pooled * torch.arange(pooled.numel()).to(dtype).view(pooled.shape).cos()).sum().backward()
        results.append((pooled.detach(), inputs.grad))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual) and expected.stride() == actual.stride()


def test_stem_pooling_first_saves_no_input():
    kept = []
    maps = torch.randn(2, 64, 16, 16, requires_grad=True)
    net = build_resnet("resnet18")
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.shape) or saved, lambda saved: saved
    ):
        net.maxpool(net.relu(maps))
    # The indices of the maxima, and the ReLU's output.
    assert kept == [torch.Size([2, 64, 8, 8])] * 2


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("size", [8, 9, 33, 50])
def test_stage_sides_need_no_network(stem, size):
    net = with_features(build_resnet("resnet18", stem=stem, width=16), [1, 2, 3, 4])
    maps = net(torch.zeros(2, 3, size, size))
    actual = {stage: tuple(maps[f"layer{stage}"].shape[2:]) for stage in range(1, 5)}
    assert actual == {stage: (side, side) for stage, side in stage_sides(stem, size).items()}


def test_only_convolutions_of_images_become_channels_last():
    dynamic = nn.Conv2d(2, 3, 3)
    dynamic.register_parameter("kernels", nn.Parameter(torch.rand(4, 3, 2, 3, 3)))
    layers = [nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3), nn.Conv3d(2, 3, 3), dynamic]
    net = nn.ModuleList(layers)
    net.register_parameter("maps", nn.Parameter(torch.rand(1, 2, 3, 3)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    to_channels_last(net)
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name in ("0.weight", "1.weight"):
        assert after.pop(name).is_contiguous(memory_format=torch.channels_last)
    assert all(value.is_contiguous() for value in after.values())


@pytest.mark.parametrize(
    ("layer", "safe"),
    [
        (nn.Conv2d(15, 4, 1, 2), False),
        (nn.Conv2d(1, 4, 1, 3), False),
        (nn.Conv2d(30, 4, 1, (1, 2), groups=2), False),
        (nn.Conv2d(16, 4, 1, 2), True),
        (nn.Conv2d(15, 4, 1), True),
        (nn.Conv2d(15, 4, (1, 2), 2), True),
        (nn.Conv2d(15, 4, 1, 2, padding=1), True),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_stride_that_overruns_memory_is_replaced(layer, safe, named):
    """Output and gradients are those of the contiguous layer."""
    images = torch.rand(2, layer.in_channels, 9, 8)
    changed = copy.deepcopy(layer)
    for _ in range(2):
        changed.apply(make_safe)
    assert changed.stride == (layer.stride if safe else (1, 1))
    to_channels_last(changed)
    last = images.to(memory_format=torch.channels_last)
    expected = layer(images)
    actual = changed(input=last) if named else changed(last)
    torch.testing.assert_close(actual, expected)
    factors = torch.rand(expected.shape)
    for output in (actual, expected):
        (output * factors).sum().backward()
    torch.testing.assert_close(changed.weight.grad, layer.weight.grad)
    layer.zero_grad()
