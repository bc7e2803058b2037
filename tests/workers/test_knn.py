"""k-NN accuracy over the workers against one that computes all features at once."""

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
    """Images of three classes that noise nearly hides; the sixth of a split cannot be decoded. Each worker has a copy."""
    folder = tmp_path_factory.mktemp(f"knn{comm.rank()}")
    generator = np.random.default_rng(3)
    for split, number in (("train", train), ("val", val)):
        for place in range(number):
            path = folder / split / f"class{place % CLASSES}" / f"{place:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (20, 20, 3)) // 2
            pixels[:, :, place % CLASSES] += 12
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            if place == 5:
                path.write_bytes(b"not an image")
    train = scan(str(folder), "train", max_bad=5)
    return train, scan_validation(str(folder), train)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build_resnet("resnet18", stem="small").eval()


@torch.no_grad()
def features(net, images):
    """The L2-normalised features under the head, and the labels, of what can be decoded."""
    items = [images.read(place) for place in range(len(images))]
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
def test_accuracy_is_that_of_one_process_with_all_features_in_one_matrix(
    tmp_path_factory, net, run, monkeypatch, train, val, batch
):
    """Numbers of images that no number of workers but one divides, and fewer batches or images than workers."""
    monkeypatch.setattr(knn, "BATCH", batch)
    monkeypatch.setattr(run, "bad_images", set())
    train, val = write_images(tmp_path_factory, train, val)
    (bank, bank_labels), (asked, truth) = features(net, train), features(net, val)
    assert (len(bank), len(asked)) == (len(train) - 1, len(val) - (len(val) > 5))
    cosines, index = (asked @ bank.T).topk(len(train) // CLASSES, dim=1)
    votes = torch.zeros(len(asked), CLASSES).scatter_add_(
        1, bank_labels[index], (cosines / 0.07).exp()
    )
    expected = 100 * (votes.argmax(1) == truth).double().mean().item()
    assert 0 < expected < 100 or len(val) == 3
    found = knn_accuracy(net, train, val, CONFIG, run)
    assert allgather(found.top1, "found") == pytest.approx([expected] * comm.size())
    spread = torch.linalg.svdvals((asked - asked.mean(0)).double())  # (m,)
    area = (spread.cumsum(0) / spread.sum()).sum().item() + asked.shape[1] - len(asked)
    areas = allgather(found.auc, "areas")
    assert areas == pytest.approx([area / asked.shape[1]] * comm.size(), abs=1e-5)
    assert (found.k, found.counted) == (len(train) // CLASSES, len(asked))
    counted = "12 of 13" if len(val) == 13 else "3"
    assert found.text.startswith(
        f"k-NN accuracy on {counted} images of {val.root}: top-1 {expected:.2f} %, k = 9 among 28 of 29 images"
    )


def test_k_may_be_given_and_images_without_a_label_neither_count_nor_vote(
    tmp_path_factory, net, run, monkeypatch
):
    monkeypatch.setattr(run, "bad_images", set())
    train, val = write_images(tmp_path_factory, 29, 13)
    (bank, bank_labels), (asked, truth) = features(net, train), features(net, val)
    for images, labels in ((train, bank_labels), (val, truth)):
        images.labels[::3] = -1
        labels[:] = torch.tensor(
            [label for place, label in enumerate(images.labels) if images.read(place)[2] == []]
        )
    bank, bank_labels, asked, truth = (
        bank[bank_labels >= 0],
        bank_labels[bank_labels >= 0],
        asked[truth >= 0],
        truth[truth >= 0],
    )
    for k in (1, 4, 1000):
        cosines, index = (asked @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(asked), CLASSES).scatter_add_(
            1, bank_labels[index], (cosines / 0.07).exp()
        )
        found = knn_accuracy(net, train, val, SimpleNamespace(**{**vars(CONFIG), "knn_k": k}), run)
        assert found.top1 == pytest.approx(100 * (votes.argmax(1) == truth).double().mean().item())
        assert (found.k, found.counted) == (min(k, len(bank)), len(asked))
