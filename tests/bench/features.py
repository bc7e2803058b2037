"""How fast features are extracted and validation images classified, beside the bare work: decoding, crop and forward pass.

python tests/bench/features.py [--images 192] [--repeats 5]

One worker, one thread, no loader processes, so that nothing overlaps on either side: bare seconds are what decoding and
passes take by themselves, in loops of their own. All is measured in turn in one run; ratios are of medians.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from job import classifier  # noqa: E402
from job.config import LinearConfig  # noqa: E402
from job.data.folders import read_image  # noqa: E402
from job.knn import extract  # noqa: E402
from job.linear import BATCH, validate  # noqa: E402
from job.run.run import Run  # noqa: E402
from moco.augment import centre_view, normalize  # noqa: E402

BAR = 0.9
RESULTS = Path(__file__).parent / "results" / "features.json"


def write_photos(folder: Path, images: int) -> None:
    """Write JPEGs of 500x375 with the spectrum of photographs, as many of them for validation as for training."""
    generator = np.random.default_rng(0)
    for number in range(images):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        for split in ("train", "val"):
            path = folder / split / str(number % 4) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy).save(path, quality=90)


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


@torch.no_grad()
def measure(images: int, repeats: int) -> dict:
    """Return medians of seconds, and the ratios of the bare seconds to ours."""
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), images)
        config = LinearConfig(data=folder, batch_size=BATCH, workers=0, print_freq=10**6)
        with Run(os.path.join(folder, "run"), 1) as run:
            torch.set_num_threads(1)
            run.log.speaks = False
            parts = classifier.build(config, run)
            paths = [parts.val.path(place) for place in range(images)]
            crop = centre_view(config.image_size)
            inputs = normalize(torch.stack([crop(read_image(path)) for path in paths[:BATCH]]))
            tasks = {
                "decode": lambda: [crop(read_image(path)) for path in paths],
                "forward": lambda: [parts.encoder(inputs) for _ in range(images // BATCH)],
                "extract": lambda: list(extract(parts.encoder, parts.val, config, run)),
                "validate": lambda: validate(parts),
            }
            took = {name: [] for name in tasks}
            for turn in range(repeats + 1):
                for name, work in tasks.items():
                    took[name].append(seconds(work))
                print(f"turn {turn} of {repeats}", file=sys.stderr)
    medians = {name: statistics.median(values[1:]) for name, values in took.items()}  # the first turn warms up
    bare = medians["decode"] + medians["forward"]
    ratios = {f"{name}_over_bare": bare / medians[name] for name in ("extract", "validate")}
    return {**ratios, **{f"{name}_s": value for name, value in medians.items()}, "images": images, "repeats": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192, help=f"a multiple of {BATCH}")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.images % BATCH or options.images < BATCH:
        parser.error(f"--images {options.images}: expected a multiple of {BATCH}")
    found = measure(options.images, options.repeats)
    found |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": f"torch {torch.__version__}"}
    found |= {"command": f"python {' '.join(sys.argv)}", "date": time.strftime("%Y-%m-%d")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    slow = [name for name in ("extract_over_bare", "validate_over_bare") if found[name] < BAR]
    sys.exit(f"below {BAR}: {', '.join(slow)}" if slow else 0)


if __name__ == "__main__":
    main()
