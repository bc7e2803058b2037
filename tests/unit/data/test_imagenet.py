"""ImageNet as downloaded: flat validation images with a table, and a tar file per class."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from errors import refused
from job.data.folders import scan, scan_validation
from job.data.imagenet import SOLUTION, TRUTH
from job.data.index import index
from job.errors import RunError
from job.metrics.log import Log

WNIDS = ["n01440764", "n01443537", "n02085620"]
CLASSES = [2, 0, 1, 2]  # of the validation images 1 to 4
NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
KIT = "ILSVRC2012_devkit_t12/data"


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(root, names):
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg())


def write_tar(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(jpeg())
            tar.addfile(member, io.BytesIO(jpeg()))


def write_solution(path):
    """Write Kaggle's table, in another order than the images, with boxes behind the class."""
    rows = [f"{NAMES[n].removesuffix('.JPEG')},{WNIDS[CLASSES[n]]} 1 2 3 4 " for n in (3, 1, 0, 2)]
    path.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")


def write_kit(folder):
    """Write the development kit's ground truth, with numbers in another order, and meta.mat."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRUTH).write_text("".join(f"{3 - number}\n" for number in CLASSES))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array(
        [(3 - n, wnid, 0) for n, wnid in enumerate(WNIDS)] + [(4, "n00001740", 3)], dtype=kind
    )
    savemat(folder / "meta.mat", {"synsets": synsets})


@pytest.fixture
def data(tmp_path):
    """A folder like Kaggle's, with classes in train/ and flat val/."""
    data = tmp_path / "ILSVRC/Data/CLS-LOC"
    write(data / "train", [f"{wnid}/{wnid}_{n}.JPEG" for wnid in WNIDS for n in (1, 2)])
    write(data / "val", NAMES)
    return data


TABLES = {
    "Kaggle's": lambda top, data: write_solution(top / SOLUTION),
    "Kaggle's in val": lambda top, data: write_solution(data / "val" / SOLUTION),
    "the kit's": lambda top, data: write_kit(data / KIT),
    "the kit's files": lambda top, data: write_kit(data),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_labels_flat_validation_images(tmp_path, data, name):
    TABLES[name](tmp_path, data)
    val = scan_validation(str(data), scan(str(data), "train"))
    assert [val.classes[label] for label in val.labels] == [WNIDS[number] for number in CLASSES]
    assert val.names.all() == NAMES


@pytest.mark.parametrize("half", [None, TRUTH, "meta.mat"])
def test_missing_table_is_named_in_the_error(tmp_path, data, half):
    if half:
        write_kit(tmp_path / "kit")
        (tmp_path / "kit" / half).rename(data / half)
    message = refused(scan_validation, str(data), scan(str(data), "train"))
    assert (
        SOLUTION in message
        and TRUTH in message
        and "meta.mat" in message
        and f"{data}/val" in message
    )
    assert scan(str(data), "val").labelled == 0


@pytest.mark.parametrize(
    "content", ["ImageId\n", "ImageId,PredictionString\na\n", "ImageId,PredictionString\na,\n"]
)
def test_invalid_table_is_refused(tmp_path, data, content):
    (tmp_path / SOLUTION).write_text(content + "ILSVRC2012_val_00000001\n")
    assert f"{tmp_path}/{SOLUTION} is invalid" in refused(scan, str(data), "val")


def test_damaged_kit_is_refused(data):
    write_kit(data)
    (data / "meta.mat").write_bytes(b"x")
    assert f"{data}/meta.mat is invalid" in refused(scan, str(data), "val")


def test_images_missing_in_the_table_have_no_label(data):
    write_kit(data)
    write(data / "val", ["ILSVRC2012_val_00000009.JPEG", "mine.JPEG"])
    assert (scan(str(data), "val").labels >= 0).tolist() == [True] * 4 + [False] * 2


def test_tars_of_imagenet_are_labelled(tmp_path):
    for wnid in WNIDS:
        write_tar(
            tmp_path / "train" / f"{wnid}.tar", [f"{wnid}_{number}.JPEG" for number in (7, 3)]
        )
    write_tar(tmp_path / "val" / "ILSVRC2012_img_val.tar", NAMES)
    write_kit(tmp_path / KIT)
    with pytest.raises(RunError, match="job.pack --index"):
        scan(str(tmp_path), "train")
    index(str(tmp_path), Log(speaks=False))
    train = scan(str(tmp_path), "train")
    assert (train.classes, train.labels.tolist()) == (WNIDS, [0, 0, 1, 1, 2, 2])
    assert train.names[0] == "n01440764/n01440764_7.JPEG" and train.read(0)[2] == []
    val = scan_validation(str(tmp_path), train)
    assert val.labels.tolist() == CLASSES


def test_tar_of_class_tars_must_be_extracted(tmp_path):
    write_tar(tmp_path / "train" / "ILSVRC2012_img_train.tar", [f"{wnid}.tar" for wnid in WNIDS])
    message = refused(index, str(tmp_path), Log(speaks=False))
    assert f"tar -xf FILE -C {tmp_path}/train" in message


def test_downloaded_tars_are_refused_together(tmp_path):
    """Only the second contains images."""
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", [f"{wnid}.tar" for wnid in WNIDS])
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", NAMES)
    message = refused(index, str(tmp_path), Log(speaks=False))
    assert f"Extract it into {tmp_path}/train" in message and "n01440764.tar" in message
    assert not (tmp_path / "index.npz").exists()
