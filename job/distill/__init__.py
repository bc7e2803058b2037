"""Distillers: losses between the features of the student and of a frozen teacher.

Shape letters: N workers, B images of a worker's batch, NB images of the total batch, b images of a
micro-batch, S student channels, T teacher channels, C channels of either network, H x W map size,
P = H W positions of a map, R = b H W positions of all images, d outputs of a head, K embeddings in
a queue, G teacher channels matched to each student channel, n of the items that the docstring
names.

targets: a distiller's view of the teacher's features, the input of its loss.
factor: the divisor of the distillation loss. share: the distillation loss at the start, as a
multiple of the framework's reference loss.
row: an image's pooled features of the teacher in a file, as in job/evaluate.
matching, refresh: MGD's assignment of teacher channels to student channels, and its computation.
"""

from job.distill.base import Distiller
from job.distill.disco import DisCo
from job.distill.gram import Gram
from job.distill.mgd import MGD
from job.distill.projector import Projector
from job.distill.similarity import Similarity
from job.distill.simreg import SimReg

DISTILLERS: dict[str, type[Distiller]] = {
    "mgd": MGD,
    "projector": Projector,
    "gram": Gram,
    "simreg": SimReg,
    "similarity": Similarity,
    "disco": DisCo,
}
