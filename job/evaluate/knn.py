"""Weighted k-nearest neighbours: measure frozen features without training on them.

The images of both sets are divided among the workers. The features of the validation images are
gathered once. Features of training images stay on their worker, which sends only the nearest
neighbours of each validation image. The result is the same for any number of workers with equally
many threads: no block of the computation depends on that number.
Source: arXiv 1805.01978, section 3.4.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from job.cluster import comm
from job.config import LinearConfig
from job.data.folders import every_nth_batch
from job.data.images import Images
from job.engine.passes import centre_crops
from job.engine.run import Run
from job.errors import RunError
from job.metrics.collapse import spectrum_auc
from job.networks import Network, with_features
from job.options import Common, Options

K, TEMPERATURE = 200, 0.07
BATCH = 64  # images at a time
VOTING = 1024  # images whose votes are summed at a time
Block = tuple[torch.Tensor, torch.Tensor]  # features (n, C) and labels (n,)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent on `counted` images by votes of their k nearest, and its line.

    auc: area under the features' cumulative singular values (job/metrics/collapse.py).
    """

    top1: float
    auc: float
    k: int
    counted: int
    text: str

    def numbers(self) -> dict[str, float]:
        """Return the numbers by their names in metrics.jsonl."""
        return {"knn": self.top1, "knn_auc": self.auc, "knn_k": self.k, "knn_images": self.counted}


def choose_k(bank: Images, k: int) -> int:
    """Return `k`, or if it is 0, the smaller of K and the mean size of a class of `bank`.

    It is at most the number of images with a label. The mean is over the classes with images.
    Unlike the smallest class, it ignores the tail of a long-tailed set: a class of one image does
    not make k 1.
    """
    labels = bank.labels[bank.labels >= 0]
    return max(1, min(k or min(K, len(labels) // len(np.unique(labels))), len(labels)))


def knn_accuracy(
    net: Network, bank: Images, queries: Images, config: Options | LinearConfig, run: Run
) -> Accuracy:
    """Return the accuracy of a network's features under its head, on centre crops. A collective.

    Each image of `queries` gets the label with the largest sum of exp(cosine / TEMPERATURE) among
    its k nearest of `bank`. Undecodable images, and images without a label, neither count nor vote.
    config: knn_k, image_size, precision, workers, print_freq and max_bad_images are used.
    RunError, on all workers: one of the sets has no image that counts.
    Stopped, on all workers: a signal arrived.
    """
    encoder = with_features(net.eval(), [], output="flatten")
    features, truth = gather(list(extract(encoder, queries, config, run)), queries, run)
    k = choose_k(bank, config.knn_k)
    voting: list[torch.Tensor] = []
    blocks = counted(extract(encoder, bank, config, run), voting)
    predicted = vote(exchange(nearest(features, blocks, k), run), k, len(bank.classes))
    mine = truth.split(counts(len(truth), run.size))[run.rank]
    sums = run.total(right=(predicted == mine).sum(), counted=(mine >= 0).sum(), voting=sum(voting))
    for name, images in (("counted", queries), ("voting", bank)):
        if not sums[name]:
            raise RunError(
                f"{images.root}: no labelled image can be decoded; expected one or more", code=1
            )
    top1, k = 100 * sums["right"] / sums["counted"], min(k, int(sums["voting"]))
    auc = spectrum_auc(features[truth >= 0])
    text = (
        f"k-NN accuracy on {queries.some(sums['counted'])}: top-1 {top1:.2f} %,"
        f" k = {k} among {bank.some(sums['voting'])};"
        f" AUC of the features' singular values {auc:.3f} (0.5 to 1; higher is nearer to collapse)"
    )
    return Accuracy(top1, auc, k, int(sums["counted"]), text)


def counted(blocks: Iterable[Block], numbers: list) -> Iterator[Block]:
    """Yield blocks, and append to `numbers` the number of images with a label in each."""
    for features, labels in blocks:
        numbers.append((labels >= 0).sum())
        yield features, labels


@torch.no_grad()
def extract(encoder: nn.Module, images: Images, config: Common, run: Run) -> Iterator[Block]:
    """Yield this worker's L2-normalised features (n, C) and labels (n,), -1 if undecodable."""
    every = range(len(images))
    for inputs, labels in centre_crops(images, every, BATCH, config, run, f"k-NN, {images.root}"):
        with run.autocast(config.precision):
            features = encoder(inputs)["flatten"]
        yield F.normalize(features.float(), dim=1), labels


def gather(blocks: list[Block], images: Images, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features (m, C) and labels (m,) of all workers, in the order of the images."""
    width = comm.highest(torch.tensor(blocks[0][0].shape[1] if blocks else 0), "knn.width")
    features = torch.cat(
        [features for features, _ in blocks] or [torch.zeros(0, int(width), device=run.device)]
    )
    labels = torch.cat(
        [labels for _, labels in blocks] or [torch.zeros(0, dtype=torch.long, device=run.device)]
    )
    every = range(len(images))
    indices = [
        index
        for rank in range(run.size)
        for batch in every_nth_batch(every, BATCH, rank, run.size)
        for index in batch
    ]
    order = torch.tensor(indices).argsort().to(run.device)
    return comm.gather(features, "knn.features")[order], comm.gather(labels, "knn.labels")[order]


def nearest(queries: torch.Tensor, blocks: Iterable[Block], k: int) -> torch.Tensor:
    """Return the keys (m, k) of the k nearest in `blocks` to each of queries (m, C), in any order.

    All cosines are never in memory at once. A block replaces keys only in rows where one of its
    cosines is not below the row's smallest. In a large bank, most blocks have few such rows.
    """
    best = to_keys(
        queries.new_full((len(queries), k), -torch.inf),
        torch.zeros(k, dtype=torch.long, device=queries.device),
    )
    smallest = queries.new_full((len(queries),), -torch.inf)
    for features, labels in blocks:
        cosines = (queries @ features.T).masked_fill_(labels < 0, -torch.inf)  # (m, n)
        (rows,) = (cosines.amax(dim=1) < smallest).logical_not().nonzero(as_tuple=True)
        keys = torch.cat([best[rows], to_keys(cosines[rows], labels.clamp_min(0))], dim=1)
        best[rows] = keys = keys.topk(k, dim=1, sorted=False).values
        smallest[rows] = from_keys(keys.amin(dim=1))[0]
    return best


def to_keys(cosines: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return int64 keys with the order of the float32 cosines (m, n).

    Among equal cosines, the smaller of labels (n,) has the larger key. So the largest keys do not
    depend on the order of the search, nor on the worker.
    """
    bits = cosines.view(torch.int32)
    return ((bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32) | (0xFFFFFFFF - labels)


def from_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and labels of `to_keys`."""
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def counts(m: int, size: int) -> list[int]:
    """Return how many of m images each of `size` workers counts."""
    return [m // size + (rank < m % size) for rank in range(size)]


def exchange(keys: torch.Tensor, run: Run) -> torch.Tensor:
    """Send each worker the rows of keys (m, k) that it counts. Return this worker's.

    They have the keys of all N workers, (m / N, N k).
    """
    m, k = keys.shape
    counted = counts(m, run.size)
    received = comm.exchange(keys, counted, "knn.nearest")  # (N x m / N, k)
    return received.view(run.size, counted[run.rank], k).transpose(0, 1).flatten(1)


def vote(keys: torch.Tensor, k: int, classes: int) -> torch.Tensor:
    """Return the label (m,) with most votes of the k largest of the keys (m, n)."""
    return torch.cat([most_votes(some, k, classes) for some in keys.split(VOTING)])


def most_votes(keys: torch.Tensor, k: int, classes: int) -> torch.Tensor:
    """Return the labels of `vote`, with memory for a sum of each image and class."""
    cosines, labels = from_keys(keys.topk(k, dim=1).values)
    weights = (cosines.double() / TEMPERATURE).exp()
    return weights.new_zeros(len(cosines), classes).scatter_add_(1, labels, weights).argmax(1)
