"""The best checkpoint of a classifier's run."""

from types import SimpleNamespace

import pytest
import torch

from job.position import Position
from job.evaluate.classifier import settle_best


@pytest.mark.parametrize(
    ("best", "kept"), [(2, True), (3, False), (None, False), ("damaged", True), ({}, True)], ids=str
)
def test_settle_best_removes_a_later_best(tmp_path, best, kept):
    """Without best.pth.tar the next accuracy is the best."""
    run = SimpleNamespace(
        folder=str(tmp_path),
        on_first=lambda work: work(),
        log=SimpleNamespace(line=lambda text: None),
    )
    parts = SimpleNamespace(run=run, best=80.0)
    if best is not None:
        torch.save(
            {"epoch": best, "step": 0} if isinstance(best, int) else best, tmp_path / "best.pth.tar"
        )
    settle_best(parts, Position(2, 0))
    assert (tmp_path / "best.pth.tar").exists() == kept
    assert parts.best == (80.0 if best == 2 else -1.0)
