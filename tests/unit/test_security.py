"""What a run must not do with what it is given, and what it must not give away."""

import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest

from job.data.shards import INDEX, load_index
from job.errors import RunError
from runs import errors_of

REPO = Path(__file__).parents[2]
SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp --moco-t 0.2 -j 0 --keep 9".split()
STEPS = 50 // 8  # of an epoch
SECRET = "hunter2-of-{}-is-not-to-be-seen"
# As they come from a shell, a scheduler, and those who put them where a launcher hands them on.
NAMES = ["AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "SLURM_JWT", "HOROVOD_TOKEN", "MGD_SECRET", "NCCL_TOKEN", "LOGNAME_TOKEN"]

# The second epoch ends by an error that nobody has foreseen, in a function whose locals have the environment.
FAIL = f"""
import os
if "HOROVOD_RANK" in os.environ:
    import torch
    step, done = torch.optim.SGD.step, []

    def failing(self, *arguments, **named):
        step(self, *arguments, **named)
        done.append(dict(os.environ))
        if len(done) == {STEPS + 2}:
            raise ZeroDivisionError("what nobody has foreseen")

    torch.optim.SGD.step = failing
"""


@pytest.fixture(scope="module")
def failed(start_job, images, tmp_path_factory):
    """Folder and output of a run of two workers that saves, and fails then; its umask is neither usual nor the strictest."""
    folder = tmp_path_factory.mktemp("security")
    (folder / "sitecustomize.py").write_text(FAIL)
    before = os.umask(0o007)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
            for name in NAMES:
                patch.setenv(name, SECRET.format(name))
            job = start_job(2, folder / "runs" / "run", [images, *SMALL])
    finally:
        os.umask(before)
    output = job.finish()
    assert job.process.returncode != 0 and "error: rank" in output and "what nobody has foreseen" in output, output
    return job.folder, output


def test_no_variable_s_value_gets_into_the_folder_or_the_output(failed):
    folder, output = failed
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"last.pth.tar", "metrics.jsonl", "log.txt", "config.yaml"} <= set(files)
    for name in NAMES:
        assert SECRET.format(name) not in output
        assert [file for file, content in files.items() if SECRET.format(name).encode() in content] == []


def test_what_a_run_writes_follows_the_umask(failed):
    folder, _ = failed
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o660) and len(modes) >= 5
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o770] * 2


def test_options_of_yaml_are_never_objects(images, tmp_path):
    harm = tmp_path / "harm"
    (tmp_path / "options.yaml").write_text(f"lr: !!python/object/apply:os.mkdir ['{harm}']\n")
    [line] = errors_of("job.train", [[images, "--config", tmp_path / "options.yaml"]])
    assert "not YAML" in line and not harm.exists()


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_index_of_packed_images_is_never_objects(tmp_path):
    content = np.array([Harmful(tmp_path / "harm")], dtype=object)
    np.savez(tmp_path / INDEX, format=content)
    with pytest.raises(RunError, match="is no whole index"):
        load_index(str(tmp_path))
    assert not (tmp_path / "harm").exists()


def test_no_source_reads_pickles_or_runs_text():
    """Of all ways to do it the ones that slip in most easily."""
    ways = [
        r"(?<!FILE, )weights_only=False",  # a message names it
        r"allow_pickle=True",
        r"pickle\.loads?\(",
        r"yaml\.(?!safe_)\w*load\(",
        r"(?<![.\w])(eval|exec)\(",
    ]
    sources = [path for package in ("job", "mgd", "moco") for path in (REPO / package).rglob("*.py")]
    assert len(sources) > 40
    assert [str(path) for path in sources if re.search("|".join(ways), path.read_text())] == []
