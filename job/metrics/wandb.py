"""A run's curves at Weights & Biases, with --log-to wandb."""

import os
import secrets
import sys

from job.metrics.tracker import Tracker, package


class WandB(Tracker):
    """A run of Weights & Biases, with its files in wandb/ in the run's folder.

    Its own variables apply: WANDB_PROJECT (default: moco-mgd), WANDB_MODE=offline, ...
    RunError: the package is not installed.
    """

    name = "wandb"

    def __init__(self) -> None:
        super().__init__()
        self.wandb = package(self.name)

    def start(self) -> None:
        """Start or resume the run."""
        self.use(os.environ.get("WANDB_RUN_ID") or self.id or secrets.token_hex(4))
        hooks = sys.exit, sys.excepthook
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "moco-mgd"),
                name=os.environ.get("WANDB_NAME", self.title),
                id=self.id,
                resume="allow",
                dir=self.folder,
                config=self.options,
                allow_val_change=True,  # a resume may change options
                settings=self.wandb.Settings(console="off"),
            )
        finally:
            sys.exit, sys.excepthook = hooks  # wandb.init replaces them permanently
        # W&B's own step counts messages, and several messages can have the same optimizer step.
        self.run.define_metric("steps", hidden=True)
        self.run.define_metric("*", step_metric="steps")

    def send(self, steps: int, numbers: dict[str, float]) -> None:
        """Log numbers."""
        self.run.log({"steps": steps, **numbers})

    def finish(self, how: str) -> None:
        """Finish the run."""
        self.run.finish(exit_code=int(how == "error"))
