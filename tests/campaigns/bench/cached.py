"""Measure the teacher's pooled features read from a file, instead of computed in each step.

bench.py starts it: python cached.py FOLDER PHOTOS. The program computes them in each step, because
each epoch has new views. For a fixed view, a file could have a row of float16 for each image. The
distiller is simreg without a framework. All times are the processor's, on one core.
"""

import statistics

import numpy as np
import torch
from torch import nn

import setting
from job.engine.run import Run
from job.networks import UNDER_HEAD
from single_steps import Steps

BATCH = setting.BATCH // 2
READS = 50  # batches of a measurement


class Rows(nn.Module):
    """A teacher that reads random rows of a file instead of its passes."""

    def __init__(self, table: np.ndarray):
        super().__init__()
        self.table, self.random = table, np.random.default_rng(0)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        chosen = self.random.integers(len(self.table), size=len(images))
        return {UNDER_HEAD: torch.from_numpy(self.table[chosen]).float()}


def main() -> None:
    parser = setting.repeating(__doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=100_000, help="images in the file")
    options = parser.parse_args()
    setting.pin()
    method = {"framework": "none", "distill": ["simreg"]}
    with Run(str(options.folder / "cached"), 1) as run:
        computing, reading = (Steps(options, run, BATCH, **method) for _ in range(2))
        teacher = computing.training.distillation.networks.teacher
        shape = options.rows, teacher.widths[UNDER_HEAD]
        path = options.folder / "rows.f16"
        table = np.memmap(path, np.float16, "w+", shape=shape)
        table[:] = 1.0
        rows = Rows(table)
        object.__setattr__(reading.training.distillation.networks.teacher, "net", rows)
        images = torch.zeros(BATCH, 3, options.size, options.size).contiguous(
            memory_format=torch.channels_last
        )

        def read() -> None:
            for _ in range(READS):
                rows(images)

        tasks = {"computing": computing.seconds, "reading": reading.seconds, "rows": read}
        tasks["forward"] = torch.no_grad()(lambda: teacher.net(images))
        times = setting.interleaved(tasks, options.repeats, clock=setting.cpu_seconds)
    path.unlink()
    row = statistics.median(times["rows"]) / READS / BATCH
    forward = statistics.median(times["forward"]) / BATCH
    setting.write_figures(
        options.folder,
        "cached",
        cached_row_s=row,
        cached_forward_s=forward,
        cached_forward_over_row=forward / row,
        cached_step_over_step=setting.ratio(times["reading"], times["computing"]),
        cached_bytes_per_image=table.itemsize * shape[1],
    )


if __name__ == "__main__":
    main()
