"""The loss factor of --loss-share: its measurement, its side effects and its errors."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from job.distill import DISTILLERS, loss_factor
from job.distill.base import Networks
from job.distill.mgd import MGD
from job.distill.momentum import MOMENTUM
from job.distill.pooled import pooled
from job.distill.teacher import Teacher
from job.config import Config
from job.data.loader import Batches
from job.data.folders import scan
from job.data.randomness import permutation, torch_seed
from job.errors import RunError
from mgd.distiller import MGDistiller
from job.data.augment import CentreView, normalize
from runs import Kept

CHANNELS = {2: (2, 6), 4: (3, 7)}
IMAGES, SIDE, BATCH, BATCHES = 19, 8, 4, 3


class Net(nn.Module):
    """images (B, 3, H, W) -> {"layerN": (B, C, H, W)}, after a batch norm, times `size`."""

    def __init__(self, widths, size=1.0):
        super().__init__()
        self.norm, self.size = nn.BatchNorm2d(3), size
        self.layers = nn.ModuleDict(
            {f"layer{stage}": nn.Conv2d(3, width, 1) for stage, width in widths.items()}
        )

    def forward(self, images):
        return {name: self.size * layer(self.norm(images)) for name, layer in self.layers.items()}


class StandIn:
    """The fields of a run that a measurement needs, on worker `rank` of `size`."""

    device = torch.device("cpu")

    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size
        self.log, self.bad = Kept(), []

    def autocast(self, precision):
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def batches(self, views, draws, processes):
        return Batches(views, draws, processes)

    def rounds(self, count):
        return range(1, count + 1)

    def note_bad_images(self, files, *_):
        self.bad += files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of noise. The last one cannot be decoded."""
    folder = tmp_path_factory.mktemp("scale")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / "train" / "a" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)
    path.write_bytes(b"no image")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few and small batches."""
    monkeypatch.setattr(loss_factor, "BATCH", BATCH)
    monkeypatch.setattr(loss_factor, "BATCHES", BATCHES)


def training(folder, rank=0, size=1, reducer="amp", student_size=1.0, **options):
    """Return a distiller and the networks that it measures, with the same weights on any worker."""
    torch.manual_seed(0)
    nets = [Net({stage: widths[i] for stage, widths in CHANNELS.items()}) for i in (0, 1)]
    nets[0].size = student_size
    distiller = object.__new__(MGD)  # no ResNet has such stages
    distiller.config = Config(image_size=SIDE, workers=0, **options)
    distiller.module = MGDistiller(CHANNELS, reducer, factor=123.0).train()
    framework = SimpleNamespace(
        encoder=nets[0].train(), reference=math.log(100), reference_text="ln(100)"
    )
    teacher = Teacher(nets[1].eval(), norms={}, digest="", shown="")
    return distiller, Networks(
        StandIn(rank, size), scan(str(folder), "train", max_bad=5), framework, teacher
    )


def set_factor(distiller, networks, share):
    """Measure, record and set the factor of a distiller, and return it."""
    change = loss_factor.measure_factor(distiller, networks, share)
    change.record()
    distiller.apply(change)
    return distiller.factor.item()


def plainly(distiller, networks, batches):
    """Return the distillation losses of batches at a factor of 1, computed separately."""
    reducer, teacher = distiller.module.reducer, networks.teacher.net
    student = networks.framework.encoder.train(distiller.batch_statistics)
    losses = []
    for number, batch in enumerate(batches):
        pixels = torch.stack(
            [CentreView(SIDE)(networks.images.read(int(index))[0]) for index in batch]
        )
        s, t = student(normalize(pixels)), teacher(normalize(pixels))
        drop = torch.Generator().manual_seed(torch_seed(0, "drop", epoch=0, step=number))
        distiller = MGDistiller(CHANNELS, reducer, factor=1.0)
        targets = distiller.targets([t["layer2"], t["layer4"]], drop)
        losses.append(distiller([s["layer2"], s["layer4"]], targets).item())
    return losses


@pytest.mark.parametrize("reducer", ["amp", "rd"])
@pytest.mark.parametrize(("batches", "own"), [(1, False), (3, False), (4, False), (3, True)])
def test_factor_gives_loss_share(
    folder,
    monkeypatch,
    reducer,
    batches,
    own,
):
    """With four batches of four, the last three of nineteen images are left out.

    own: the student uses the statistics of each batch.
    """
    monkeypatch.setattr(MGD, "batch_statistics", own)
    monkeypatch.setattr(loss_factor, "BATCHES", batches + 5 * (batches == 4))
    distiller, networks = training(folder, reducer=reducer, loss_share=0.25)
    order = permutation(IMAGES, 0, "refresh")
    groups = [order[first : first + BATCH] for first in range(0, batches * BATCH, BATCH)]
    raw = plainly(*copy.deepcopy((distiller, networks)), groups)
    factor = set_factor(distiller, networks, 0.25)
    assert sum(raw) / batches / factor == pytest.approx(0.25 * math.log(100), rel=1e-6)
    [line], [record] = networks.run.log.lines, networks.run.log.records
    assert f"loss factor {factor:.6g}: the distillation loss of {batches * BATCH} images" in line
    assert [record[name] for name in ("epoch", "step", "distiller", "loss_factor")] == [
        0,
        0,
        "mgd",
        factor,
    ]
    assert record["raw_distillation"] == pytest.approx(sum(raw) / batches)


@pytest.mark.parametrize("reducer", ["amp", "rd"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_measure_is_equal_for_any_workers(folder, reducer, size):
    """The bits are equal, even with more workers than batches. Each batch is measured once."""
    sample = list(range(BATCH * BATCHES))
    expected = loss_factor.measure(*training(folder, reducer=reducer), sample)
    by_worker = torch.stack(
        [
            loss_factor.measure(*training(folder, rank, size, reducer), sample)
            for rank in range(size)
        ]
    )
    assert (by_worker != 0).sum(0).tolist() == [1] * BATCHES
    assert torch.equal(by_worker.sum(0), expected) and torch.equal(
        by_worker.flip(0).sum(0), expected
    )
    assert len(set(expected.tolist())) == BATCHES


def test_measure_reports_undecodable_image(folder):
    distiller, networks = training(folder)
    loss_factor.measure(distiller, networks, [0, IMAGES - 1])
    [file] = networks.run.bad
    assert f"{IMAGES - 1}.png" in file


def test_measure_changes_only_the_factor(folder):
    distiller, networks = training(folder)
    student, teacher = networks.framework.encoder, networks.teacher.net
    modules = nn.ModuleList([student, teacher, distiller.module])
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    change = loss_factor.measure_factor(distiller, networks, 1.0)
    assert all(torch.equal(before[name], value) for name, value in modules.state_dict().items())
    assert networks.run.log.lines == networks.run.log.records == []
    distiller.apply(change)
    after = modules.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["2.factor"]
    assert student.training and distiller.module.training and not teacher.training


@pytest.mark.parametrize("needed", [True, False])
def test_measure_uses_student_as_momentum_encoder(
    folder,
    monkeypatch,
    needed,
):
    """It uses the batch's statistics, like the encoder, which starts as the student."""
    seen, targets = [], MGD.targets

    def keep(self, teacher, generator):
        seen.append(teacher.pop(MOMENTUM, None))
        return targets(self, teacher, generator)

    monkeypatch.setattr(MGD, "targets", keep)
    monkeypatch.setattr(MGD, "batch_statistics", True)
    monkeypatch.setattr(MGD, "momentum", staticmethod(lambda _: 0.5 if needed else None))
    distiller, networks = training(folder)
    student = copy.deepcopy(networks.framework.encoder)
    sample = list(range(BATCH))
    loss_factor.measure(distiller, networks, sample)
    [actual] = seen
    if not needed:
        assert actual is None
        return
    images = [CentreView(SIDE)(networks.images.read(index)[0]) for index in sample]
    expected = pooled(student.train()(normalize(torch.stack(images))))
    torch.testing.assert_close(actual, expected.detach())


def test_factor_ignores_scale_of_student(folder):
    """A batch norm normalises its features by their own statistics."""
    factors = []
    for size in (1.0, 30.0):
        distiller, networks = training(folder, student_size=size)
        factors.append(set_factor(distiller, networks, 1.0))
    assert factors[0] == pytest.approx(factors[1], rel=1e-3)


def test_batch_statistics_distillers():
    actual = {name for name, kind in DISTILLERS.items() if kind.batch_statistics}
    assert actual == {"gram", "similarity", "disco"}


def test_measure_of_small_set_is_one_batch(folder, monkeypatch):
    monkeypatch.setattr(loss_factor, "BATCH", 32)
    distiller, networks = training(folder)
    set_factor(distiller, networks, 1.0)
    assert f"of {IMAGES} images" in networks.run.log.lines[0]


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "nan"), (0.0, "0")])
def test_measure_factor_refuses_loss(folder, value, shown):
    distiller, networks = training(folder, loss_share=0.5)
    with torch.no_grad():
        for layer in networks.teacher.net.layers.values():
            layer.weight.fill_(value)
            layer.bias.fill_(-1.0)
    if not value:  # the student is silent, like the teacher
        for stage in CHANNELS:
            distiller.module.get_submodule(f"bn{stage}").weight.data.zero_()
            distiller.module.get_submodule(f"bn{stage}").bias.data.fill_(-9.0)
    with pytest.raises(
        RunError, match=rf"factor of --loss-share 0.5: .* loss over 12 images is {shown};"
    ) as caught:
        loss_factor.measure_factor(distiller, networks, 0.5)
    assert caught.value.code == 1
    assert distiller.factor.item() == 123.0
