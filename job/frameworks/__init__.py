"""Self-supervised frameworks, each a file and an entry here.

Shape letters: N workers, B images of a worker's batch, NB images of the total batch, b images of a
micro-batch, S student channels, dim outputs of the head (pooled features without a head), H height,
W width, K negatives in MoCo's queue.

Terms:
    student             the network that is trained; MoCo's is its query encoder
    encoder             a network that returns its outputs by name
    view                a random crop of an image, with changed colours
    micro-batch         the images that pass through the networks at a time
    signs of collapse   numbers that show whether all images have similar features
"""

from job.frameworks.base import Framework
from job.frameworks.moco import MoCoFramework
from job.frameworks.none import NoFramework
from job.frameworks.simsiam import SimSiamFramework

FRAMEWORKS: dict[str, type[Framework]] = {
    "moco": MoCoFramework,
    "none": NoFramework,
    "simsiam": SimSiamFramework,
}
