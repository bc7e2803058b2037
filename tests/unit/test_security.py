"""What a run must not do with what it is given."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from job.data.shards import INDEX, load_index
from job.errors import RunError
from runs import errors_of

REPO = Path(__file__).parents[2]


@pytest.mark.slow
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
    with pytest.raises(RunError, match="incomplete index"):
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
    sources = [
        path for package in ("job", "mgd", "moco") for path in (REPO / package).rglob("*.py")
    ]
    assert len(sources) > 40
    assert [str(path) for path in sources if re.search("|".join(ways), path.read_text())] == []
