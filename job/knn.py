"""How good features are, without training on them: k-nearest-neighbour accuracy of checkpoints, beside the same
networks untrained.

python -m job.knn DIR CHECKPOINT...
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from job.options import Parser
from job.data.folders import ImageFolder, scan
from job.data.views import CentreViews, loader
from job.errors import RunError
from job.run import launch
from job.run.checkpoint import load
from job.weights import read_backbone
from moco.augment import normalize
from moco.encoder import build_resnet, with_features

BATCH = 64


@torch.no_grad()
def knn_accuracy(bank, bank_labels, features, labels, k: int = 200, temperature: float = 0.07) -> float:
    """Return the top-1 accuracy in percent of a weighted k-NN (arXiv 1805.01978, section 3.4).

    bank (n, C) and features (m, C) are L2-normalised, labels (n,) and (m,). Each image takes the label with
    the largest sum of exp(cosine / temperature) among its k nearest of the bank.
    """
    classes = int(bank_labels.max()) + 1
    right = 0
    for some, truth in zip(features.split(256), labels.split(256), strict=True):  # never all distances at once
        nearest, index = (some @ bank.T).topk(min(k, len(bank)), dim=1)  # (256, k)
        votes = torch.zeros(len(some), classes).scatter_add_(1, bank_labels[index], (nearest / temperature).exp())
        right += (votes.argmax(1) == truth).sum().item()
    return 100 * right / len(labels)


@torch.no_grad()
def extract(nets: list[torch.nn.Module], images: ImageFolder, size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return each network's L2-normalised features under the head (n, C), and the labels (n,), of all images."""
    encoders = [with_features(net.eval(), [], output="flatten") for net in nets]
    batches = [list(range(first, min(first + BATCH, len(images)))) for first in range(0, len(images), BATCH)]
    views = loader(CentreViews(images, size), batches, launch.cores(), pin=False)
    features, labels, bad = [[] for _ in nets], [], []
    for pixels, truth, undecodable in tqdm(views, desc=images.root, leave=False, disable=not sys.stdout.isatty()):
        inputs = normalize(pixels)
        for found, encoder in zip(features, encoders, strict=True):
            found.append(F.normalize(encoder(inputs)["flatten"], dim=1))
        labels.append(truth)
        bad += undecodable
    if bad:
        print(f"{len(bad)} images in {images.root} cannot be decoded; others took their places; the first: {bad[0]}")
    return [torch.cat(found) for found in features], torch.cat(labels)


def evaluate(path: str, data: str) -> tuple[str, int, float, float]:
    """Return a checkpoint's network, its epochs, and the k-NN accuracy of it and of the same network untrained."""
    saved, weights = load(path), read_backbone(path)
    size = saved.get("config", {}).get("image_size", 224)
    train, val = scan(data, "train", max_bad=100), scan(data, "val", "valid", max_bad=100)
    if train.classes != val.classes:
        raise RunError(f"the classes of {train.root} and {val.root} differ: {sorted(set(train.classes) ^ set(val.classes))[:3]}")
    torch.manual_seed(0)
    trained, untrained = (build_resnet(weights.arch, stem=weights.stem) for _ in range(2))
    trained.load_state_dict(weights.state, strict=False)  # without the head, which is not used
    banks, bank_labels = extract([trained, untrained], train, size)
    features, labels = extract([trained, untrained], val, size)
    accuracies = [knn_accuracy(bank, bank_labels, some, labels) for bank, some in zip(banks, features, strict=True)]
    return weights.arch, saved.get("epoch", 0), *accuracies


def main(argv: list[str] | None = None) -> None:
    """Run `job.knn` on the command line's options."""
    with launch.reported_errors():
        parser = Parser(prog="job.knn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("data", metavar="DIR", help="folder with train/<class>/* and val/<class>/*")
        parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+")
        options = parser.parse_args(argv)
        rows = [(path, *evaluate(path, options.data)) for path in options.checkpoints]
        width = max(len(row[0]) for row in rows)
        print(f"{'checkpoint':{width}}  {'network':16} epochs  k-NN top-1  untrained")
        for path, arch, epochs, trained, untrained in rows:
            print(f"{path:{width}}  {arch:16} {epochs:6}  {trained:8.1f} %  {untrained:7.1f} %")


if __name__ == "__main__":
    main()
