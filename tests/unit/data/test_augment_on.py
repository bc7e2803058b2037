"""--augment-on device: colours, blur and flips in batches, with the same draws as on the CPU."""

from types import SimpleNamespace

import pytest
import torch

from job.config import Config, read_config
from job.data.folders import scan
from job.data.loader import Batches
from job.errors import RunError
from job.position import Position
from job.training import Training


def batches(images, augment_on, aug_plus, views=2, **options):
    """Return the batches of a run of one worker, from its second step on."""
    options |= {"augment_on": augment_on, "aug_plus": aug_plus}
    config = Config(image_size=32, batch_size=8, epochs=1, workers=0, **options)
    run = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), batches=Batches)
    framework = SimpleNamespace(views=views)
    unused = dict.fromkeys(("val", "distillation", "trained", "gradients", "optimizer"))
    training = Training(config, run, scan(str(images), "train"), framework=framework, **unused)
    return list(training.batches(Position(0, 1)))


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_batches_have_the_framework_s_view_count(images, augment_on):
    one, two = (batches(images, augment_on, True, number) for number in (1, 2))
    for (single, *_), (both, *_) in zip(one, two, strict=True):
        assert (len(single), len(both)) == (1, 2) and torch.equal(single[0], both[0])


@pytest.mark.parametrize("aug_plus", [False, True])
def test_batches_rendered_on_the_device_match(images, aug_plus):
    on_cpu, on_device = (batches(images, on, aug_plus) for on in ("cpu", "device"))
    assert len(on_cpu) == len(on_device) == 5
    for ours, theirs in zip(on_cpu, on_device, strict=True):
        assert torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2] == []
        for view, other in zip(ours[0], theirs[0], strict=True):
            assert (
                (view.shape, view.dtype)
                == (other.shape, other.dtype)
                == ((8, 3, 32, 32), torch.uint8)
            )
            assert (view.int() - other.int()).abs().float().mean((1, 2, 3)).max() < 2


def test_batches_of_weak_views_are_bit_equal(images):
    on_cpu, on_device, others = (
        batches(images, on, False, weak_views=weak)
        for on, weak in (("cpu", True), ("device", True), ("cpu", False))
    )
    for (ours, *_), (theirs, *_), (strong, *_) in zip(on_cpu, on_device, others, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
        assert not any(torch.equal(one, two) for one, two in zip(ours, strong, strict=True))


def test_augment_on_refuses_other_values():
    with pytest.raises(RunError, match="^--augment-on 'gpu': "):
        read_config(["images", "--augment-on", "gpu"])
