"""Measure decoding and two views on one core: the project's and the baseline's.

bench.py starts it: python views.py FOLDER PHOTOS. All read files on disk (in the system's cache),
in turn, in one process with one thread. Times are of the processor. The baseline's loader returns
normalised floats. Ours returns bytes, which the device normalises. To show the cost of this
difference, the baseline is also measured without the floats.
"""

import statistics
from pathlib import Path

from torchvision import transforms

import baseline
import setting
from job.data.folders import scan
from job.data.loader_process import KEPT
from job.data.views import RandomViews
from job.cluster.memory import keep_freed_memory
from job.data.augment import RandomView


def measure(folder: Path, size: int, repeats: int) -> dict:
    """Return images per second, and their ratios."""
    paths, images = setting.photos(folder), scan(str(folder), "train")
    bytes_view = baseline.random_view(size, last=(transforms.PILToTensor(),))
    floats = baseline.Images(paths, baseline.random_view(size), baseline.random_view(size))
    pil_bytes = baseline.Images(paths, bytes_view, bytes_view)
    ours = RandomViews(images, RandomView(size, aug_plus=True), 2, seed=0)
    crops = RandomViews(images, RandomView(size, aug_plus=True), 2, seed=0, rendered=False)
    everything = range(len(paths))
    tasks = {
        "ours": lambda: [ours[0, index] for index in everything],
        "pil": lambda: [floats[index] for index in everything],
        "pil_bytes": lambda: [pil_bytes[index] for index in everything],
        "decode_crop": lambda: [crops[0, index] for index in everything],
    }
    times = setting.interleaved(tasks, repeats, setting.cpu_seconds)
    rates = {name: len(paths) / statistics.median(values) for name, values in times.items()}
    return {
        "input_over_pil": setting.ratio(times["pil"], times["ours"]),
        "input_over_pil_bytes": setting.ratio(times["pil_bytes"], times["ours"]),
        "decode_crop_images_per_s": rates["decode_crop"],
        "input_images_per_s": rates["ours"],
        "input_pil_images_per_s": rates["pil"],
    }


def main() -> None:
    options = setting.repeating(__doc__, repeats=7).parse_args()
    setting.pin()
    keep_freed_memory(KEPT)  # as in a loader process, here also for the baseline's views
    setting.write_figures(
        options.folder, "views", **measure(options.photos, options.size, options.repeats)
    )


if __name__ == "__main__":
    main()
