"""A run's curves in MLflow, with --log-to mlflow."""

import os
import time

from job.errors import RunError
from job.metrics.tracker import Tracker

AT_ONCE = 100  # parameters that a server takes in a message
LONGEST = 6000  # characters of a parameter
STATUS = {"complete": "FINISHED", "stopped": "KILLED", "error": "FAILED"}


class MLflow(Tracker):
    """A run of MLflow.

    Its own variables apply: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME (default: moco-mgd), ...
    RunError: the package is not installed.
    """

    name = "mlflow"

    def __init__(self) -> None:
        super().__init__()
        try:
            from mlflow import MlflowClient, entities
        except ImportError:
            fix = "pip install '.[mlflow]', or leave it out"
            raise RunError(f"--log-to mlflow: the package mlflow is missing: {fix}") from None
        self.make_client, self.entities = MlflowClient, entities

    def start(self) -> None:
        """Start or resume the run."""
        self.client = self.make_client()
        self.id = self.saved_id()
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", "moco-mgd")
        found = self.client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self.client.create_experiment(project)
        run = self.client.create_run(experiment, run_name=self.title)
        self.id = run.info.run_id
        self.save_id(self.id)
        make, options = self.entities.Param, self.options.items()
        parameters = [make(name, str(value)[:LONGEST]) for name, value in options]
        for first in range(0, len(parameters), AT_ONCE):
            self.client.log_batch(self.id, params=parameters[first : first + AT_ONCE])

    def send(self, steps: int, numbers: dict[str, float]) -> None:
        """Log numbers."""
        make, now = self.entities.Metric, int(1000 * time.time())  # ms
        metrics = [make(tag, float(number), now, steps) for tag, number in numbers.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def finish(self, how: str) -> None:
        """End the run."""
        self.client.set_terminated(self.id, STATUS[how])
