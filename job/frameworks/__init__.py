"""Self-supervised frameworks, each a file and an entry here.

Shapes: N is the number of workers, B of images in a worker's batch, b of images in a micro-batch,
S of channels in a student's stage, and d of outputs of the head. H and W are the height and width
of an image or a map. K is the number of negatives in MoCo's queue.

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
