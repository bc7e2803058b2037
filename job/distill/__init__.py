"""Distillers, each a file and an entry here."""

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
