"""Self-supervised frameworks, each a file and an entry here."""

from job.frameworks.base import Framework
from job.frameworks.moco import MoCoFramework
from job.frameworks.none import NoFramework
from job.frameworks.simsiam import SimSiamFramework

FRAMEWORKS: dict[str, type[Framework]] = {
    "moco": MoCoFramework,
    "none": NoFramework,
    "simsiam": SimSiamFramework,
}
