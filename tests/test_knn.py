import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from job import knn
from job.data.folders import scan
from job.errors import RunError
from job.knn import evaluate, extract, knn_accuracy
from moco.augment import centre_view, normalize
from moco.encoder import build_resnet


def slow_accuracy(bank, bank_labels, features, labels, k, temperature):
    """One image after the other, one vote after the other."""
    right = 0
    for feature, label in zip(features.tolist(), labels.tolist(), strict=True):
        cosines = [sum(a * b for a, b in zip(feature, other, strict=True)) for other in bank.tolist()]
        nearest = sorted(range(len(cosines)), key=lambda place: -cosines[place])[:k]
        votes = {}
        for place in nearest:
            voted = int(bank_labels[place])
            votes[voted] = votes.get(voted, 0.0) + math.exp(cosines[place] / temperature)
        right += max(votes, key=votes.get) == label
    return 100 * right / len(labels)


def random_set(n, classes, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    return features, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize(("n", "m", "classes"), [(40, 30, 3), (25, 300, 5), (3, 10, 2)])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (1000, 0.3)])
def test_accuracy_is_that_of_a_slow_loop(n, m, classes, k, temperature):
    bank, bank_labels = random_set(n, classes, seed=1)
    features, labels = random_set(m, classes, seed=2)
    expected = slow_accuracy(bank, bank_labels, features, labels, k, temperature)
    assert knn_accuracy(bank, bank_labels, features, labels, k, temperature) == pytest.approx(expected)
    assert 0 < expected < 100


def clusters(n, seed, noise=0.05):
    labels = torch.arange(n) % 4
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.eye(4)[labels] + noise * torch.randn(n, 4, generator=generator), dim=1), labels


@pytest.mark.parametrize("k", [1, 5, 200])
def test_separable_classes_are_all_right(k):
    assert knn_accuracy(*clusters(40, 0), *clusters(600, 1), k=k) == 100


def test_wrong_labels_are_all_wrong():
    features, labels = clusters(40, 1)
    assert knn_accuracy(*clusters(40, 0), features, (labels + 1) % 4, k=5) == 0


def test_the_nearest_weigh_more():
    """One vote of cosine 1 against two of 0.5: at a low temperature the one wins, at a high one the two."""
    bank = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [0.5, -(0.75**0.5)]])
    query = bank[:1], torch.tensor([0])
    assert knn_accuracy(bank, torch.tensor([0, 1, 1]), *query, k=3, temperature=0.07) == 100
    assert knn_accuracy(bank, torch.tensor([0, 1, 1]), *query, k=3, temperature=10.0) == 0
    assert knn_accuracy(bank, torch.tensor([0, 1, 1]), *query, k=1, temperature=10.0) == 100


def test_a_class_that_the_bank_lacks_is_never_right():
    bank, labels = clusters(8, 0)
    assert knn_accuracy(bank, labels, bank, torch.full((8,), 9)) == 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of two classes that differ in colour; images are read in this process."""
    monkeypatch.setattr(knn.launch, "cores", lambda: 0)
    monkeypatch.setattr(knn, "BATCH", 4)
    for split, number in (("train", 10), ("val", 4)):
        for place in range(number):
            colour = ((255, place, 0), (0, place, 255))[place % 2]
            path = tmp_path / split / "ab"[place % 2] / f"{place:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), colour).save(path)
    return tmp_path


def test_features_are_those_of_each_network_under_its_head_of_all_images_in_their_order(folder):
    torch.manual_seed(0)
    nets = [build_resnet("resnet18", stem="small").train() for _ in range(2)]
    images = scan(str(folder), "train")
    features, labels = extract(nets, images, 16)
    assert torch.equal(labels, torch.from_numpy(images.labels))
    views = normalize(torch.stack([centre_view(16)(images.read(place)[0]) for place in range(10)]))
    for net, found in zip(nets, features, strict=True):
        net.fc = torch.nn.Identity()
        with torch.no_grad():
            expected = net.eval()(views)
        torch.testing.assert_close(found, F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


def checkpoint(folder, **more):
    torch.manual_seed(1)
    state = {f"module.encoder_q.{key}": value for key, value in build_resnet("resnet18", stem="small").state_dict().items()}
    path = str(folder / "checkpoint.pth.tar")
    torch.save({"epoch": 7, "arch": "resnet18", "state_dict": state, "config": {"image_size": 16}, **more}, path)
    return path


def test_a_checkpoint_is_told_with_its_epochs_beside_the_untrained_network(folder, capsys):
    path = checkpoint(folder)
    knn.main([str(folder), path])
    [head, row] = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["checkpoint", "network", "epochs"]
    found, arch, epochs, trained, _, untrained, _ = row.split()
    assert (found, arch, epochs, trained) == (path, "resnet18", "7", "100.0")
    assert 0 <= float(untrained) <= 100


def test_folders_of_different_classes_are_one_line(folder):
    (folder / "val" / "c").mkdir()
    with pytest.raises(RunError) as caught:
        evaluate(checkpoint(folder), str(folder))
    assert "\n" not in str(caught.value)
    assert "'c'" in str(caught.value)


@pytest.mark.parametrize("argv", [[], ["DIR"], ["DIR", "FILE", "--foo"]])
def test_a_wrong_command_line_ends_with_one_line_and_code_two(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        knn.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
