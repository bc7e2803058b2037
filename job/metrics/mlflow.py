"""A run's curves in MLflow, with --log-to mlflow."""

import os
import time

from job.metrics.tracker import Tracker, package

AT_ONCE = 100  # parameters that a server accepts in one message
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
        self.mlflow = package(self.name)

    def start(self) -> None:
        """Start or resume the run."""
        self.client = self.mlflow.MlflowClient()
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", "moco-mgd")
        known = self.client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self.client.create_experiment(project)
        run = self.client.create_run(experiment, run_name=self.title)
        self.use(run.info.run_id)
        make, options = self.mlflow.entities.Param, self.options.items()
        parameters = [make(name, str(value)[:LONGEST]) for name, value in options]
        for first in range(0, len(parameters), AT_ONCE):
            self.client.log_batch(self.id, params=parameters[first : first + AT_ONCE])

    def send(self, steps: int, numbers: dict[str, float]) -> None:
        """Log numbers."""
        make, now = self.mlflow.entities.Metric, int(1000 * time.time())  # ms
        metrics = [make(tag, float(number), now, steps) for tag, number in numbers.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def finish(self, how: str) -> None:
        """End the run."""
        self.client.set_terminated(self.id, STATUS[how])
