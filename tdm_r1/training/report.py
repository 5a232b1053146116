"""Trackers of other makers: what metrics.jsonl gets, they get too, as `report_to` asks.

Each is imported only when asked for. What they need to know besides (a server, a project, to stay
offline) comes from their own environment variables: WANDB_MODE, MLFLOW_TRACKING_URI, ...
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tdm_r1.errors import ConfigError

log = logging.getLogger(__name__)

_IDS = "report_to.json"  # in a run's folder: under which name a tracker knows it


class Tracker(Protocol):
    """Somewhere that numbers and pictures are shown."""

    def log(self, iteration: int, numbers: dict[str, float]) -> None:
        """Numbers by name, such as "train/reward"."""

    def picture(self, iteration: int, file: Path) -> None:
        """A PNG file."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in output/tensorboard."""

    def __init__(
        self, output: Path, settings: dict[str, Any], iteration: int, *, resumed: bool
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = output / "tensorboard"
        # A resumed run writes its iterations again; those of the lost attempt are not shown.
        self.writer = SummaryWriter(str(folder), purge_step=iteration + 1 if resumed else None)
        if not resumed:
            self.writer.add_text("recipe", f"```\n{json.dumps(settings, indent=1)}\n```", 0)

    def log(self, iteration: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, iteration)

    def picture(self, iteration: int, file: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as page:
            pixels = np.asarray(page.convert("RGB"))
        self.writer.add_image("sample", pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """One run of Weights & Biases, gone on with when training is resumed."""

    def __init__(
        self, output: Path, settings: dict[str, Any], iteration: int, *, resumed: bool
    ) -> None:
        import wandb

        self.image = wandb.Image
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tdm-r1"),
            name=output.name,
            id=_identity(output, "wandb", resumed, lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(output),
            config=settings,
        )
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, numbers: dict[str, float]) -> None:
        self.run.log({"iteration": iteration, **numbers})

    def picture(self, iteration: int, file: Path) -> None:
        self.run.log({"iteration": iteration, "sample": self.image(str(file))})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """One run of the experiment MLFLOW_EXPERIMENT_NAME ("tdm-r1"), gone on with when resumed.

    Without MLFLOW_TRACKING_URI it is in output/mlflow.db, its pictures in output/mlflow.
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], iteration: int, *, resumed: bool
    ) -> None:
        from mlflow.tracking import MlflowClient

        server, folder = os.environ.get("MLFLOW_TRACKING_URI"), output.resolve()
        self.client = MlflowClient(server or f"sqlite:///{folder / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tdm-r1")
        known = self.client.get_experiment_by_name(name)
        if known is None:
            files = None if server else (folder / "mlflow").as_uri()
            experiment = self.client.create_experiment(name, artifact_location=files)
        else:
            experiment = known.experiment_id

        def create() -> str:
            run = self.client.create_run(experiment, run_name=output.name)
            for key, value in settings.items():
                self.client.log_param(run.info.run_id, key, value)
            return run.info.run_id

        self.run = _identity(output, "mlflow", resumed, create)
        self.client.update_run(self.run, status="RUNNING")

    def log(self, iteration: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.run, name, value, step=iteration)

    def picture(self, iteration: int, file: Path) -> None:
        self.client.log_artifact(self.run, str(file), "samples")

    def close(self) -> None:
        self.client.set_terminated(self.run)


# By the name of the package, which is that of its module too.
TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}


def check(names: Sequence[str]) -> None:
    """Raises ConfigError, with the command to run, for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: '{name}' is not installed; run: pip install {name}")


class Report:
    """Several trackers as one. One that fails is dropped with a warning; the run goes on."""

    def __init__(
        self,
        names: Sequence[str],
        output: Path,
        settings: dict[str, Any],
        iteration: int,
        *,
        resumed: bool,
    ) -> None:
        """`settings`: the recipe, flat. `iteration`: how many are done."""
        self.trackers: dict[str, Tracker] = {}
        for name in names:
            with _Dropping(self, name):
                self.trackers[name] = TRACKERS[name](output, settings, iteration, resumed=resumed)

    def log(self, iteration: int, record: dict[str, Any], prefix: str) -> None:
        """The numbers of a record, those of nested ones as "prefix/outer/inner"."""
        numbers = dict(flatten(record, prefix))
        self._each(lambda tracker: tracker.log(iteration, numbers))

    def picture(self, iteration: int, file: Path) -> None:
        """A page of samples."""
        self._each(lambda tracker: tracker.picture(iteration, file))

    def close(self) -> None:
        """Let every tracker finish."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            with _Dropping(self, name):
                call(tracker)


class _Dropping:
    """Whatever a tracker raises, a full disk or a server that is gone, costs the tracker only."""

    def __init__(self, report: Report, name: str) -> None:
        self.report, self.name = report, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self.report.trackers.pop(self.name, None)
        log.warning("report_to: %s is dropped, the run goes on: %r", self.name, error)
        return True


def flatten(record: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    """(name, number) pairs of a record; lists, texts and what is missing are left out."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        name = f"{prefix}/{key}"
        if isinstance(value, dict):
            found += flatten(value, name)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((name, float(value)))
    return found


def _identity(output: Path, tracker: str, resumed: bool, create: Callable[[], str]) -> str:
    """The id that a run had with a tracker before it was resumed, else a new one, stored."""
    file = output / _IDS
    known = json.loads(file.read_text()) if file.is_file() else {}
    if not resumed or tracker not in known:
        known[tracker] = create()
        file.write_text(json.dumps(known))
    return known[tracker]
