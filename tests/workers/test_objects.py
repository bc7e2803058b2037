"""Objects sent between workers arrive unchanged, and never run code."""

import io
import os
import pickle

import numpy as np
import pytest
import torch

from job.cluster import comm
from job.data.folders import ImageFolder, scan
from job.data.images import Names
from job.data.index import index
from job.data.tars import write_shard
from job.cluster.objects import allgather, broadcast, decode, encode
from job.metrics.log import Log
from job.checkpoints.foreign import Backbone


class Harmful:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_values_arrive_unchanged():
    values = ["\udc80 ü", None, True, 2**70, 0.1, (1, "a")]
    mine = {"rank": comm.rank(), "values": values, "tensor": torch.arange(comm.rank() + 2)}
    for rank, received in enumerate(allgather(mine, "values")):
        assert torch.equal(received.pop("tensor"), torch.arange(rank + 2))
        assert received == {"rank": rank, "values": values}
    assert broadcast(("of", comm.rank())) == ("of", 0)


def test_image_folders_arrive_unchanged():
    folder = ImageFolder("/data", ["a", "b"], ["a/1\udc80.png", "b/2.png"], [0, 1], max_bad=3)
    received = broadcast(folder if comm.rank() == 0 else None)
    assert [received.path(number) for number in range(2)] == [
        "/data/a/1\udc80.png",
        "/data/b/2.png",
    ]
    assert (received.classes, received.labels.tolist(), received.max_bad) == (["a", "b"], [0, 1], 3)
    assert received.digest(0, 1, 2) == folder.digest(0, 1, 2)


def test_packed_images_arrive_unchanged(tmp_path):
    (tmp_path / "train").mkdir()
    write_shard(
        str(tmp_path / "train" / "a.tar"),
        [(number, f"c/{number}.png", 0, b"image") for number in range(5)],
    )
    index(str(tmp_path), Log(speaks=False))
    images = scan(str(tmp_path), "train")
    received = decode(encode(images))
    assert [received.content(number) for number in range(5)] == [b"image"] * 5
    assert received.digest(0, 1, 2) == images.digest(0, 1, 2)


def test_backbones_arrive_unchanged():
    backbone = Backbone(
        "resnet18", "small", 16, {"conv1.weight": torch.ones(2)}, "from here", "none", {"epoch": 3}
    )
    received = decode(encode(backbone))
    assert torch.equal(received.state.pop("conv1.weight"), backbone.state.pop("conv1.weight"))
    assert received == backbone


@pytest.mark.parametrize(
    "hide", [lambda harm: [{"a": harm}], lambda harm: Names(np.zeros(1, dtype=np.uint8), harm)]
)
def test_decode_runs_no_code(tmp_path, hide):
    content = encode(hide(Harmful(tmp_path / "harm")))
    with pytest.raises(pickle.UnpicklingError):
        decode(content)
    assert not (tmp_path / "harm").exists()
    torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=False)
    assert (tmp_path / "harm").exists()  # a plain load would run it
