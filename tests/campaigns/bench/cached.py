"""Measure the teacher's pooled features read from a file, instead of computed in each step.

bench.py starts it: python cached.py FOLDER PHOTOS. The file has a row of float32 for each image, as
job.embed writes it. The distiller is simreg without a framework. All times are the processor's, on
one core.
"""

import functools
import json
import operator
import statistics
from pathlib import Path

import numpy as np
import torch

import setting
from job.data.images import Images
from job.distill.feature_file import Rows
from job.engine.run import Run
from job.evaluate.tables import companion
from job.networks import UNDER_HEAD
from single_steps import Steps

BATCH = setting.BATCH // 2
READS = 50  # batches of a measurement


def write_features(path: Path, images: Images, shape: tuple[int, int]) -> None:
    """Write rows (n, T) for all images, and for others."""
    table = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    table[:] = np.random.default_rng(0).standard_normal(shape[1])
    table.flush()
    others = [f"other/{number}.jpg" for number in range(shape[0] - len(images))]
    paths = {"paths": [*images.names.all(), *others]}
    Path(companion(str(path))).write_text(json.dumps(paths))


def main() -> None:
    parser = setting.repeating(__doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=100_000, help="images in the file")
    options = parser.parse_args()
    setting.pin()
    method = {"framework": "none", "distill": ["simreg"]}
    with Run(str(options.folder / "cached"), 1) as run:
        computing = Steps(options, run, BATCH, **method)
        teacher = computing.training.distillation.networks.teacher
        shape = options.rows, teacher.widths[UNDER_HEAD]
        path = options.folder / "features.npy"
        write_features(path, computing.training.images, shape)
        reading = Steps(options, run, BATCH, **method, teacher=str(path))
        images = torch.zeros(BATCH, 3, options.size, options.size).contiguous(
            memory_format=torch.channels_last
        )
        rows, random = Rows(str(path)), np.random.default_rng(0)

        def read() -> None:
            for _ in range(READS):
                torch.from_numpy(rows.read(random.integers(options.rows, size=BATCH).tolist()))

        @torch.no_grad()
        def forward() -> None:
            teacher.net(images)

        tasks = {"computing": computing.cpu_seconds, "reading": reading.cpu_seconds}
        tasks["rows"] = functools.partial(setting.cpu_seconds, read)
        tasks["forward"] = functools.partial(setting.cpu_seconds, forward)
        times = setting.interleaved(tasks, options.repeats, clock=operator.call)
    row = statistics.median(times["rows"]) / READS / BATCH
    forward = statistics.median(times["forward"]) / BATCH
    setting.write_figures(
        options.folder,
        "cached",
        cached_row_s=row,
        cached_forward_s=forward,
        cached_forward_over_row=forward / row,
        cached_step_over_step=setting.ratio(times["reading"], times["computing"]),
        cached_bytes_per_image=rows.bytes,
    )


if __name__ == "__main__":
    main()
