"""A run's first log lines."""

import dataclasses

from job.config import Config
from job.engine.call import called
from job.engine.run import Run


def test_log_lists_options_other_than_the_defaults(tmp_path):
    """All of them are in config.yaml."""
    config = Config(data="DIR", lr=0.5, batch_size=1, out=str(tmp_path))
    options = dataclasses.asdict(config)
    del options["out"]
    with called(Run.of(config.folder(), config)) as run:
        run.begin(options, None, 5, "")
    line = (
        f"options: --data DIR --lr 0.5 --batch-size 1 (with the defaults: {tmp_path}/config.yaml)"
    )
    assert line in [each[20:] for each in (tmp_path / "log.txt").read_text().splitlines()]
