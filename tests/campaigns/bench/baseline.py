"""A plain MoCo v2 + MGD job, written the straightforward way in torch and Horovod.

The bench compares the project with it. The arithmetic is the same. The differences are:

- Views: torchvision on PIL. The loader returns normalised floats.
- Shuffled batch norm: an allgather of all float images.
- Teacher: runs with gradients and with its batch norms.
- Networks and images: NCHW, contiguous.
- Reducer: stack, argmax and gather.
- Key encoder: updated parameter by parameter.
- Optimizer: Horovod's, unchanged.
- Refresh: every worker measures every image and copies each batch's cost to the host. Rank 0 solves
  the matching arc by arc.

Shapes: B images of a worker, N workers, K queued keys, G groups of matched channels, S and T
channels of the student and the teacher, P positions of a map.
"""

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import models, transforms

from mgd.margin import margin_from_bn
from job.networks import build_resnet, stage_norms, with_features

STAGES = [1, 2, 3, 4]
FLOATS = (transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Blur:
    """Blur a PIL image by a random radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item()))


def resnet(arch: str, dim: int, mlp: bool = False) -> models.ResNet:
    """Return the network with torchvision's own stem."""
    net = build_resnet(arch, dim, mlp)
    net.relu, net.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
    return net


def random_view(size: int, last=FLOATS) -> transforms.Compose:
    """Return MoCo v2's augmentation: PIL image -> (3, size, size)."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([Blur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            *last,
        ]
    )


def centre_view(size: int) -> transforms.Compose:
    """Return the centre crop: PIL image -> (3, size, size)."""
    return transforms.Compose(
        [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *FLOATS]
    )


class Images(Dataset):
    """Image files. An item has one image for each of `views`."""

    def __init__(self, paths: list[str], *views):
        self.paths, self.views = paths, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image = Image.open(self.paths[index]).convert("RGB")
        return tuple(view(image) for view in self.views)


def shuffle(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffle the images (B, 3, H, W) over all workers.

    Return the images (B, 3, H, W) that this worker encodes, and the inverse permutation (NB,).
    """
    everyone = hvd.allgather(images, name="plain.images")  # (NB, 3, H, W)
    permutation = hvd.broadcast(
        torch.randperm(len(everyone)), root_rank=0, name="plain.permutation"
    )
    return everyone[permutation.view(hvd.size(), -1)[hvd.rank()]], permutation.argsort()


def unshuffle(keys: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Return the keys (B, dim) of this worker's own images."""
    return hvd.allgather(keys, name="plain.keys")[back.view(hvd.size(), -1)[hvd.rank()]]


def absolute_max_pooling(teacher: torch.Tensor, matching: torch.Tensor) -> torch.Tensor:
    """Return the matched response of largest magnitude at each position.

    (B, T, H, W), (G, S) -> (B, S, H, W).
    """
    candidates = torch.stack([teacher[:, channels] for channels in matching])  # (G, B, S, H, W)
    largest = candidates.abs().argmax(dim=0, keepdim=True)
    return candidates.gather(0, largest).squeeze(0)


def partial_l2(student: torch.Tensor, target: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Return the summed squared distance of the student from max(target, margin).

    It counts where the student exceeds that target, or where the target is positive.
    """
    target = torch.max(target, margin.view(1, -1, 1, 1))
    mask = (student > target) | (target > 0)
    return ((student - target) ** 2 * mask.float()).sum()


class Baseline:
    """Networks, queue, distiller and optimizer of one worker."""

    def __init__(
        self,
        teacher: dict,
        K: int = 65536,
        dim: int = 128,
        m: float = 0.999,
        T: float = 0.2,
        factor: float = 1e4,
    ):
        self.m, self.T, self.factor = m, T, factor
        self.query = with_features(resnet("resnet18", dim, mlp=True), STAGES).train()
        self.key = resnet("resnet18", dim, mlp=True).train()
        for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            k.data.copy_(q.data)
            k.requires_grad = False
        self.queue, self.pointer = F.normalize(torch.randn(dim, K), dim=0), 0

        net = resnet("resnet50", dim=1000)
        net.load_state_dict(teacher)
        self.teacher = with_features(net, STAGES, output=None).eval()
        self.margins = [
            margin_from_bn(norm.weight, norm.bias).detach() for norm in stage_norms(net).values()
        ]
        widths = [norm.num_features for norm in stage_norms(self.key).values()]
        self.matchings = [
            torch.arange(len(margin)).view(-1, S)
            for margin, S in zip(self.margins, widths, strict=True)
        ]
        self.norms = nn.ModuleList(nn.BatchNorm2d(S) for S in widths)

        trained = nn.ModuleDict({"query": self.query, "norms": self.norms})
        sgd = torch.optim.SGD(trained.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
        self.optimizer = hvd.DistributedOptimizer(sgd, named_parameters=trained.named_parameters())
        hvd.broadcast_parameters(trained.state_dict(), root_rank=0)
        hvd.broadcast_parameters(self.key.state_dict(), root_rank=0)
        self.queue = hvd.broadcast(self.queue, root_rank=0, name="plain.queue")

    def step(self, query: torch.Tensor, key: torch.Tensor) -> float:
        """Train on the two views (B, 3, H, W) of this worker's images. Return the loss."""
        loss = self.loss(query, key)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def loss(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return MoCo's cross entropy plus MGD's distance, and enqueue the keys."""
        encoded = self.query(query)
        q = F.normalize(encoded["fc"], dim=1)  # (B, dim)
        with torch.no_grad():
            for mine, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.data = mine.data * self.m + other.data * (1.0 - self.m)
            shuffled, back = shuffle(key)
            k = unshuffle(F.normalize(self.key(shuffled), dim=1), back)  # (B, dim)
        positive = (q * k).sum(dim=1, keepdim=True)
        negative = q @ self.queue.clone()  # (B, K)
        logits = torch.cat([positive, negative], dim=1) / self.T
        self.enqueue(hvd.allgather(k, name="plain.queued"))

        teacher = self.teacher(query)
        distance = 0.0
        for index, stage in enumerate(STAGES):
            s, t = self.norms[index](encoded[f"layer{stage}"]), teacher[f"layer{stage}"].detach()
            target = absolute_max_pooling(t, self.matchings[index])
            margin = self.margins[index][self.matchings[index]].mean(0)
            distance = distance + partial_l2(s, target, margin) / 2 ** (4 - stage)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long)) + distance / (
            len(q) * self.factor
        )

    def enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys by the total batch's (NB, dim). NB divides K."""
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.T
        self.pointer = (self.pointer + len(keys)) % self.queue.shape[1]


def batches(paths: list[str], total: int, size: int):
    """Yield this worker's views of its images of each total batch, epoch after epoch."""
    images = Images(paths, random_view(size), random_view(size))
    sampler = DistributedSampler(images, hvd.size(), hvd.rank())
    loader = DataLoader(images, total // hvd.size(), sampler=sampler, drop_last=True)
    for epoch in range(10**6):
        sampler.set_epoch(epoch)
        yield from loader


@torch.no_grad()
def measure(
    student: nn.Module, teacher: nn.Module, paths: list[str], size: int, batch: int = 32
) -> list[torch.Tensor]:
    """Return each stage's mean cost (S, T) over all images. Every worker measures all of them."""
    student.eval()
    sums = [0.0 for _ in STAGES]
    for (images,) in DataLoader(Images(paths, centre_view(size)), batch):
        s, t = student(images), teacher(images)
        for index, stage in enumerate(STAGES):
            one = F.normalize(s[f"layer{stage}"].flatten(2), dim=2)  # (B, S, P)
            other = F.normalize(t[f"layer{stage}"].flatten(2), dim=2)  # (B, T, P)
            distances = torch.cdist(one, other) ** 2  # (B, S, T)
            sums[index] = sums[index] + distances.sum(0).double().cpu()
    student.train()
    return [cost / len(paths) for cost in sums]
