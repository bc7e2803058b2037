"""Students and teachers that are not torchvision's ResNets: a resume gives the same bytes."""

import timm
import torch

import pytest
from job import resume
from job.checkpoints.folder import load
from job.cluster import comm
from job.cluster.objects import allgather
from job.cluster.stop import Stopped
from job.engine import replicas
from job.hints import Expectation
from job.journal import TrainingJournal
from job.position import Count, Position
from job.train import train_epoch
from steps import build_training, save_teacher

NB, SIZE, STEPS, STOP = 8, 32, 3, 2
MOBILE, VIT = "timm/mobilenetv3_small_050", "timm/test_vit"
SIMSIAM = {"framework": "simsiam", "dim": 8, "pred_dim": 4, "mlp": False}
COMPRESS = {"framework": "none", "distill": ["similarity"], "similarity": "compress"}
COMPRESS |= {"teacher_arch": VIT, "mlp": False}
MGD_AND_GRAM = {"distill": ["mgd", "gram"], "mgd_stages": [3, 4], "gram_stages": [3]}


def save_resnet(path):
    """Save a narrow ResNet-18, with more channels than the students, as a teacher."""
    save_teacher(path, width=48, arch="resnet18")


def save_vit(path):
    """Save a small ViT of timm with random weights, for images of 160 pixels, as a teacher."""
    torch.manual_seed(5)
    torch.save(timm.create_model("test_vit").state_dict(), path)


PAIRS = {  # student, function that writes the teacher, options
    "mobilenet from a resnet": (MOBILE, save_resnet, {"distill": ["simreg", "projector"]}),
    "mobilenet by mgd": (MOBILE, save_resnet, {"distill": ["mgd"]}),
    "mobilenet in simsiam": (MOBILE, save_resnet, {"distill": ["simreg"], **SIMSIAM}),
    "vit from a resnet": (VIT, save_resnet, {"distill": ["simreg"]}),
    "a user's from a resnet": ("own_network:Small", save_resnet, MGD_AND_GRAM),
    "resnet from a vit": (
        "resnet18",
        save_vit,
        {"distill": ["simreg", "similarity"], "width": 16, "teacher_arch": VIT},
    ),
    "mobilenet by compress": (MOBILE, save_vit, COMPRESS),
}


def build(run, folder, pair):
    arch, write, options = PAIRS[pair]
    if comm.rank() == 0:
        write(folder / "teacher.pth")
    run.on_first(lambda: None)  # wait for the file
    options = {"similarity_k": 6, "moco_k": 10, "loss_share": 0.0, "loss_factor": 10.0, **options}
    options |= {"teacher": str(folder / "teacher.pth"), "image_size": SIZE, "batch_size": NB}
    return build_training(run, folder / "images", arch=arch, lr=0.05, **options)


def views(training, step):
    """Return this worker's views of a step."""
    generator = torch.Generator().manual_seed(step)
    shape = (training.framework.views, NB, 3, SIZE, SIZE)
    total = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return [each.chunk(comm.size())[comm.rank()] for each in total]


def train(training, steps, stop=None):
    """Train steps of the first epoch. Return whether the training was stopped.

    stop: the step in which the last worker gets a signal.
    """
    config = training.config
    training.run.count = Count(STEPS)
    expectation = Expectation(config, training.framework, STEPS * NB)
    journal = TrainingJournal(
        training.run, config, training.framework, training.distillation.names, expectation
    )
    journal.start_epoch(0, config.lr)

    def batches():
        for step in steps:
            if step == stop and comm.rank() == comm.size() - 1:
                training.run.stop.signal = 15
            yield views(training, step), torch.arange(NB // comm.size()), []

    try:
        train_epoch(training, batches(), journal, 0, steps)
    except Stopped:
        training.run.stop.signal = None
        return True
    return False


def digests(training):
    """Return the digests of all tensors that are trained or saved, {name: digest}."""
    tensors = training.shared() | training.trained.state_dict()
    return {
        name: replicas.digest(value).item()
        for name, value in tensors.items()
        if value.element_size() % 4 == 0
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_resume_gives_the_same_bytes(run, tmp_path, pair):
    for name in ("uninterrupted", "stopped", "resumed"):
        (tmp_path / name).mkdir()
    uninterrupted = build(run, tmp_path / "uninterrupted", pair)
    start = digests(uninterrupted)
    assert not train(uninterrupted, range(STEPS))
    stopped = build(run, tmp_path / "stopped", pair)
    assert digests(stopped) == start
    assert train(stopped, range(STEPS), stop=STOP - 1)
    path = f"{run.folder}/checkpoint_0000_{STOP:06d}.pth.tar"
    saved = run.on_first(lambda: load(path))
    resumed = build(run, tmp_path / "resumed", pair)
    # As if the images were in the same folder.
    saved |= {"images": len(resumed.images), "order": resumed.order(0)}
    assert resume.restore(saved, resumed) == Position(0, STOP)
    assert not train(resumed, range(STOP, STEPS))
    result, expected = digests(resumed), digests(uninterrupted)
    same = allgather(result == expected and result != start, "same")
    assert all(same), [name for name in result if result[name] != expected[name]]
    assert sum(result[name] != value for name, value in start.items()) > 20


def test_state_names_are_body_and_fc(run, tmp_path):
    training = build(run, tmp_path, "mobilenet by mgd")
    names = training.content(Position(1, 0), None)["state_dict"]
    starts = {".".join(name.split(".")[:3]) for name in names}
    encoders = {f"module.encoder_{e}.{part}" for e in "qk" for part in ("body", "fc")}
    assert all(each == sorted(starts) for each in allgather(sorted(starts), "names"))
    assert starts == encoders | {"module.queue", "module.queue_ptr"}
