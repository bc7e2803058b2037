"""k-NN accuracy over several workers against one matrix of all features."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from job.evaluate import knn
from job.cluster import comm
from job.data.folders import scan, scan_validation
from job.evaluate.knn import knn_accuracy
from job.cluster.objects import allgather
from job.data.augment import CentreView, normalize
from job.networks import build_resnet

CLASSES = 3
CONFIG = SimpleNamespace(
    image_size=16, precision="float32", workers=0, print_freq=10, max_bad_images=5, knn_k=0
)


def write_images(tmp_path_factory, train, val):
    """Write noisy images of three classes. The sixth of a split is undecodable.

    Each worker has a copy. Return training and validation images.
    """
    folder = tmp_path_factory.mktemp(f"knn{comm.rank()}")
    generator = np.random.default_rng(3)
    for split, number in (("train", train), ("val", val)):
        for index in range(number):
            path = folder / split / f"class{index % CLASSES}" / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (20, 20, 3)) // 2
            pixels[:, :, index % CLASSES] += 12
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            if index == 5:
                path.write_bytes(b"not an image")
    train = scan(str(folder), "train", max_bad=5)
    return train, scan_validation(str(folder), train)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build_resnet("resnet18", stem="small").eval()


@torch.no_grad()
def features(net, images):
    """Return L2-normalised features before the head, and labels, of the decodable images."""
    items = [images.read(index) for index in range(len(images))]
    views = normalize(torch.stack([CentreView(16)(image) for image, _, bad in items if not bad]))
    body = torch.nn.Sequential(*list(net.children())[:-1])
    return F.normalize(body(views).flatten(1), dim=1), torch.tensor(
        [label for _, label, bad in items if not bad]
    )


@pytest.mark.parametrize(
    "train, val, batch",
    [(29, 13, 4), (29, 13, 64), (29, 3, 2)],
    ids=["", "few batches", "few images"],
)
def test_accuracy_equals_one_matrix_s(tmp_path_factory, net, run, monkeypatch, train, val, batch):
    """The images may not divide by the workers, or be fewer than the workers."""
    monkeypatch.setattr(knn, "BATCH", batch)
    monkeypatch.setattr(run, "bad_images", set())
    train, val = write_images(tmp_path_factory, train, val)
    (bank, bank_labels), (queries, truth) = features(net, train), features(net, val)
    assert (len(bank), len(queries)) == (len(train) - 1, len(val) - (len(val) > 5))
    cosines, index = (queries @ bank.T).topk(len(train) // CLASSES, dim=1)
    votes = torch.zeros(len(queries), CLASSES).scatter_add_(
        1, bank_labels[index], (cosines / 0.07).exp()
    )
    expected = 100 * (votes.argmax(1) == truth).double().mean().item()
    assert 0 < expected < 100 or len(val) == 3
    result = knn_accuracy(net, train, val, CONFIG, run)
    assert allgather(result.top1, "top1") == pytest.approx([expected] * comm.size())
    spread = torch.linalg.svdvals((queries - queries.mean(0)).double())  # (m,)
    area = (spread.cumsum(0) / spread.sum()).sum().item() + queries.shape[1] - len(queries)
    areas = allgather(result.auc, "areas")
    assert areas == pytest.approx([area / queries.shape[1]] * comm.size(), abs=1e-5)
    assert (result.k, result.counted) == (len(train) // CLASSES, len(queries))
    counted = "12 of 13" if len(val) == 13 else "3"
    assert result.text.startswith(
        f"k-NN accuracy on {counted} images of {val.root}: top-1 {expected:.2f} %, "
        "k = 9 among 28 of 29 images"
    )


def test_images_without_label_neither_count_nor_vote(tmp_path_factory, net, run, monkeypatch):
    """k is given, up to more than all images, or chosen."""
    monkeypatch.setattr(run, "bad_images", set())
    train, val = write_images(tmp_path_factory, 29, 13)
    (bank, bank_labels), (queries, truth) = features(net, train), features(net, val)
    for images, labels in ((train, bank_labels), (val, truth)):
        images.labels[::3] = -1
        labels[:] = torch.tensor(
            [label for index, label in enumerate(images.labels) if images.read(index)[2] == []]
        )
    bank, bank_labels = bank[bank_labels >= 0], bank_labels[bank_labels >= 0]
    queries, truth = queries[truth >= 0], truth[truth >= 0]
    for k in (1, 4, 1000):
        cosines, index = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(queries), CLASSES).scatter_add_(
            1, bank_labels[index], (cosines / 0.07).exp()
        )
        result = knn_accuracy(net, train, val, SimpleNamespace(**{**vars(CONFIG), "knn_k": k}), run)
        assert result.top1 == pytest.approx(100 * (votes.argmax(1) == truth).double().mean().item())
        assert (result.k, result.counted) == (min(k, len(bank)), len(queries))
