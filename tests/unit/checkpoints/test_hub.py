"""Weights from a hub: cache, checksum, and errors."""

import hashlib
import os
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from tests.unit.checkpoints.test_foreign import filled, shapes

from errors import refused
from job.checkpoints import hub
from job.checkpoints.foreign import read_backbone
from job.networks import build_resnet

RESNET = "resnet18-f37072fd.pth"  # torchvision's file
VIT = "timm/test_vit.r160_in1k"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_resnet_is_downloaded_to_torch_s_cache(cache, monkeypatch, tmp_path):
    requests, original = [], tmp_path / "original.pth"
    torch.save(filled(shapes(build_resnet, "resnet18")), original)
    name = f"resnet18-{digest(original)[:8]}.pth"
    address = f"https://download.pytorch.org/models/{name}"
    known = {"DEFAULT": SimpleNamespace(url=address)}
    monkeypatch.setattr(hub.models, "get_model_weights", lambda arch: known)

    def download(url, path, hash_prefix, progress):
        requests.append((url, hash_prefix))
        shutil.copy(original, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    weights = [read_backbone("hub:resnet18") for _ in range(2)]
    assert requests == [(address, digest(original)[:8])]  # once
    assert weights[0].arch == "resnet18" and weights[0].digest == weights[1].digest
    assert weights[0].report.endswith(f"; hub:resnet18, SHA-256 {digest(cache / name)}")


@pytest.mark.parametrize("file", hub.FILES)
def test_timm_weights_are_from_hugging_face(tmp_path, monkeypatch, file):
    requests, state = [], timm.create_model("test_vit").state_dict()

    def download(repository, name):
        requests.append((repository, name))
        if name != file:
            raise EntryNotFoundError("no such file")
        path = tmp_path / name
        if name.endswith(".bin"):
            torch.save(state, path)
        else:
            save_file(state, path)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    weights = read_backbone(f"hub:{VIT}")
    assert requests == [(VIT, name) for name in hub.FILES[: hub.FILES.index(file) + 1]]
    assert weights.arch == VIT and weights.mean == (0.5, 0.5, 0.5)
    assert weights.report.endswith(f"SHA-256 {digest(tmp_path / file)}")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("resnet18", f"https://download.pytorch.org/models/{RESNET}"),
        (VIT, f"https://huggingface.co/{VIT}/resolve/main/model.safetensors"),
    ],
)
def test_unreachable_hub_names_the_file_to_copy(cache, monkeypatch, name, address):
    def fail(*_, **__):
        raise OSError("Network is unreachable\nTraceback")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert refused(read_backbone, f"hub:{name}") == (
        f"hub:{name}: cannot get the file: Network is unreachable; on another machine, download "
        f"{address}, copy it here, and give its path instead of hub:{name}, with the network {name}"
    )
    assert not os.path.exists(cache / RESNET)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet81", "hub 'resnet81': did you mean resnet18?"),
        ("timm/test_vitt", "did you mean timm/test_vit?"),
        ("a.b:c", "no weights of a user's function"),
    ],
)
def test_unknown_name_is_refused(name, expected):
    assert expected in refused(read_backbone, f"hub:{name}")


def test_damaged_cached_file_is_refused(cache):
    """The file's name has the first digits of its SHA-256."""
    cache.mkdir()
    path = cache / RESNET
    torch.save(filled(shapes(build_resnet, "resnet18")), path)
    start = digest(path)[:8]
    assert refused(read_backbone, "hub:resnet18") == (
        f"hub:resnet18: {path}: its SHA-256 begins with {start}; expected f37072fd. Remove the file"
    )


@pytest.mark.parametrize("name", ["resnet18", VIT])
def test_download_false_refuses_a_missing_file(cache, monkeypatch, name, tmp_path):
    def fail(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(huggingface_hub.file_download, "_hf_hub_download_to_cache_dir", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused(read_backbone, f"hub:{name}", download=False)
    assert message == f"hub:{name}: no file in the cache, and this program downloads none"


def test_download_false_reads_hugging_face_s_cache(monkeypatch, tmp_path):
    def cached(repository, name, local_files_only):
        assert local_files_only
        save_file(timm.create_model("test_vit").state_dict(), tmp_path / name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert read_backbone(f"hub:{VIT}", download=False).arch == VIT
