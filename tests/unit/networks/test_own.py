"""A user's own network, as package.module:function."""

import sys

import pytest
import torch

from errors import refused
from job.networks import (
    build_network,
    check_name,
    network_outline,
    own,
    stage_norms,
    to_channels_last,
    with_features,
)

SOURCE = """
import torch
from torch import nn
from torchvision.ops import StochasticDepth


class Small(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        widths = [3, *range(4, 4 + depth)]
        pairs = zip(widths, widths[1:])
        blocks = [nn.Sequential(nn.Conv2d(C, D, 3, 2, 1), nn.BatchNorm2d(D)) for C, D in pairs]
        self.blocks, self.unused = nn.ModuleList(blocks), nn.Linear(2, 2)
        self.last = nn.Linear(4 + depth - 1, 7)

    def forward_stages(self, images):
        maps = []
        for block in self.blocks:
            images = block(images if not maps else maps[-1].relu())
            maps.append(images)
        return self.last(images.relu().mean((2, 3))), maps

    def forward(self, images):
        return self.forward_stages(images)[0]


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, residual):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3)
        self.downsample = nn.BatchNorm2d(3) if residual == "own" else nn.Identity()

    def forward(self, images):
        return self.bn(self.conv(images)) + self.downsample(images)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block("own"), Block("none")

    def forward_stages(self, images):
        first = self.first(images)
        second = self.second(first)
        return second.mean((2, 3)), [first, second]

    def forward(self, images):
        return self.forward_stages(images)[0]


class Viewed(nn.Module):
    def __init__(self, weights=False, maps=False, groups=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.of = dict(weights=weights, maps=maps, groups=groups)

    def forward(self, images):
        maps = self.conv(images)
        if self.of["weights"]:
            maps = maps * self.conv.weight.view(4, -1).norm(dim=1).view(4, 1, 1)
        if self.of["groups"]:
            maps = maps.view(len(images) * 2, 2, *maps.shape[2:]).view_as(maps)
        return maps.view(len(images), -1) if self.of["maps"] else maps.mean((2, 3))


def viewed_weights():
    return Viewed(weights=True)


def viewed_maps():
    return Viewed(maps=True)


def viewed_groups():
    return Viewed(groups=True)


class ViewedForward(Viewed):
    def forward(self, images):
        maps = self.conv(images)
        return maps.view(len(maps), -1)

    def forward_stages(self, images):
        maps = self.conv(images)
        return maps.flatten(1), [maps]


class ViewedImages(Viewed):
    def forward(self, images):
        return super().forward(images.view(len(images), -1).view_as(images))


def strided():
    return nn.Sequential(nn.Conv2d(3, 4, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def deep():
    return Small(6)


def with_argument(width):
    return Small(width)


def number():
    return 3


def flat():
    return nn.Flatten(0)


def broken():
    return nn.Linear(2, 2)


def without_file():
    raise ValueError("no such weights:\\nnone.pth")


def wrong_type():
    return len(3)


def frozen():
    net = Small()
    net.blocks[0][0].requires_grad_(False)
    return net


def all_frozen():
    return Pooled().requires_grad_(False)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(3, 1, 8, dropout=0.5, batch_first=True)

    def forward(self, images):
        return self.layer(images.flatten(2).transpose(1, 2)).mean(1)


class DropPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, images):
        return images * (torch.rand(len(images), 1) >= self.drop_prob) if self.drop_prob else images


def dropout():
    return nn.Sequential(Pooled(), nn.Dropout(0.5), DropPath())


def attention():
    return Attention()


def depth():
    return nn.Sequential(StochasticDepth(0.5, "row"), Pooled())
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_networks", None)


def test_own_two_stages_are_the_last_two():
    torch.manual_seed(0)
    net = build_network("own_networks:Small", dim=9)
    outline = network_outline("own_networks:Small", "imagenet", 64, 16)
    assert outline.maps == {3: (4, 8, 8), 4: (5, 4, 4)} and outline.pooled == 7
    assert outline.beyond == "last.bias"
    actual = with_features(net, [1, 3, 4])(torch.randn(2, 3, 16, 16))
    assert {name: tuple(value.shape) for name, value in actual.items()} == {
        "layer3": (2, 4, 8, 8),
        "layer4": (2, 5, 4, 4),
        "pooled": (2, 7),
        "fc": (2, 9),
    }
    assert stage_norms(net) == {3: net.body.blocks[0][1], 4: net.body.blocks[1][1]}
    frozen = {name for name, value in net.named_parameters() if not value.requires_grad}
    assert frozen == {"body.unused.weight", "body.unused.bias"}


def test_own_six_stages_give_the_last_four():
    outline = network_outline("own_networks:deep", "imagenet", 64, 64)
    assert outline.maps == {1: (6, 8, 8), 2: (7, 4, 4), 3: (8, 2, 2), 4: (9, 1, 1)}


def test_own_norm_of_a_shortcut_is_ignored():
    net = build_network("own_networks:Residual")
    assert stage_norms(net) == {4: net.body.second.bn}


def test_own_network_without_stages_is_pooled():
    outline = network_outline("own_networks:Pooled", "imagenet", 64, 16)
    assert outline.maps == {} and outline.pooled == 5
    actual = with_features(build_network("own_networks:Pooled"), [4], "flatten")(
        torch.zeros(2, 3, 9, 9)
    )
    assert list(actual) == ["pooled", "flatten"]


REFUSED = {
    "no_such_module:net": "no_such_module:net: cannot import no_such_module: ModuleNotFoundError",
    "own_networks:Smal": "own_networks has no function Smal; expected a function without arguments "
    "that returns an nn.Module; did you mean Small?",
    "own_networks:with_argument": "missing a required argument: 'width'; expected a function",
    "own_networks:without_file": "own_networks:without_file: the function without_file fails: "
    "ValueError: no such weights: none.pth. Fix the function",
    "own_networks:wrong_type": "wrong_type fails: TypeError: object of type 'int' has no len(). ",
    "own_networks:number": "the function returns a int; expected a function",
    "own_networks:flat": "its features are (768,); expected pooled features (b, C)",
    "own_networks:broken": "cannot process 16 x 16 pixels: mat1 and mat2 shapes cannot be",
}


@pytest.mark.parametrize("arch", REFUSED)
def test_own_network_errors_are_one_line(arch):
    check_name(arch, "-a")  # reading options does not run a user's code
    assert REFUSED[arch] in refused(build_network, arch, image_size=16)


def test_own_frozen_parameters_stay_frozen():
    net = build_network("own_networks:frozen", image_size=16)
    fixed = {name for name, value in net.body.named_parameters() if not value.requires_grad}
    assert fixed == {"blocks.0.0.weight", "blocks.0.0.bias", "unused.weight", "unused.bias"}


def test_own_frozen_network_has_an_outline():
    assert network_outline("own_networks:all_frozen", "imagenet", 64, 16).pooled == 5


@pytest.mark.parametrize("name", ["dropout", "attention", "depth"])
def test_own_training_draws_no_random_numbers(name):
    net, images = (
        build_network(f"own_networks:{name}", image_size=16).train(),
        torch.randn(2, 3, 16, 16),
    )
    generator = torch.get_rng_state()
    assert torch.equal(net(images), net(images))
    assert torch.equal(torch.get_rng_state(), generator)


def test_own_edited_function_is_probed_again(monkeypatch):
    pooled = [network_outline("own_networks:Pooled", "imagenet", 64, 16).pooled]
    module = sys.modules["own_networks"]
    monkeypatch.setattr(module, "Pooled", lambda: module.Small())
    pooled += [network_outline("own_networks:Pooled", "imagenet", 64, 16).pooled]
    assert pooled == [5, 7]


def test_own_module_is_found_in_the_current_folder(tmp_path, monkeypatch):
    """The console scripts do not add the folder to the path."""
    source = "from torch import nn\n\n\ndef build():\n    return nn.Identity()\n"
    folder = tmp_path / "current"
    folder.mkdir()
    (folder / "net_of_this_folder.py").write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(own.build_body("net_of_this_folder:build"), torch.nn.Identity)
    del sys.modules["net_of_this_folder"]


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [
        ("Viewed", True),
        ("ViewedImages", False),
        ("ViewedForward", False),
        ("viewed_weights", False),
        ("viewed_maps", False),
        ("viewed_groups", False),
    ],
)
def test_own_network_is_channels_last_if_it_can_be(name, channels_last):
    """Otherwise a `view` would fail in the first step."""
    images = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for features in (False, True):
        net = build_network(f"own_networks:{name}", image_size=8)
        of_images = with_features(net, [], output="flatten") if features else net
        before = of_images(images)
        to_channels_last(of_images)
        after = of_images(images)
        torch.testing.assert_close(after, before)
        (after["flatten"] if features else after).sum().backward()
        weight = net.body.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert weight.is_contiguous() != channels_last


def test_own_network_has_no_stride_that_overruns_memory():
    """See is_unsafe in job/networks/layout.py."""
    assert build_network("own_networks:strided", image_size=8).body[0].stride == (1, 1)
