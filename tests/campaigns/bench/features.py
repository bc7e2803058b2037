"""Measure the extraction of features and validation, over the bare work.

bench.py starts it: python features.py FOLDER PHOTOS. The bare work is decoding with the crop, and
forward passes, each in a loop of its own. There is one worker with one thread and no loader
processes, so no work overlaps on either side.
"""

import statistics
from pathlib import Path

import torch

import setting
from job.evaluate import classifier
from job.config import LinearConfig
from job.data.images import read_image
from job.evaluate.knn import BATCH, extract
from job.linear import validate
from job.engine.run import Run
from job.data.augment import CentreView, normalize


@torch.no_grad()
def measure(photos: Path, folder: Path, size: int, repeats: int) -> dict:
    """Return the ratios of the bare seconds to ours, and medians of seconds."""
    config = LinearConfig(
        data=str(photos), image_size=size, batch_size=BATCH, workers=0, print_freq=10**6
    )
    with Run(str(folder / "features"), 1) as run:
        run.log.speaks = False
        parts = classifier.build(config, run)
        paths, crop = [parts.val.path(index) for index in range(len(parts.val))], CentreView(size)
        inputs = normalize(
            torch.stack([crop(read_image(Path(path).read_bytes())) for path in paths[:BATCH]])
        )
        tasks = {
            "decode": lambda: [crop(read_image(Path(path).read_bytes())) for path in paths],
            "forward": lambda: [parts.encoder(inputs) for _ in range(len(paths) // BATCH)],
            "extract": lambda: list(extract(parts.encoder, parts.val, config, run)),
            "validate": lambda: validate(parts),
        }
        times = setting.interleaved(tasks, repeats)
    bare = [
        decode + forward for decode, forward in zip(times["decode"], times["forward"], strict=True)
    ]
    ratios = {
        f"{name}_over_bare": setting.ratio(bare, times[name]) for name in ("extract", "validate")
    }
    return ratios | {
        f"features_{name}_s": statistics.median(values) for name, values in times.items()
    }


def main() -> None:
    options = setting.repeating(__doc__, repeats=3).parse_args()
    setting.pin()
    setting.write_figures(
        options.folder,
        "features",
        **measure(options.photos, options.folder, options.size, options.repeats),
    )


if __name__ == "__main__":
    main()
