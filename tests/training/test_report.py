"""Trackers for real, where they are installed: what was logged is read back from their files."""

import logging
import math

import pytest
from PIL import Image

from tdm_r1.errors import ConfigError
from tdm_r1.training import report
from tdm_r1.training.report import Report, flatten

SETTINGS = {"model": "tiny-sd3", "optimizers.fake.lr": 1e-3, "prompts.families": ["a", "b"]}


def picture(folder, iteration):
    file = folder / f"{iteration:06d}.png"
    Image.new("RGB", (4, 3), "red").save(file)
    return file


def tell(tracker, output, start, numbers):
    """Log one number per iteration from `start` on, a picture too, and close."""
    told = Report([tracker], output, SETTINGS, start, resumed=start > 0)
    for i, value in enumerate(numbers, start=start + 1):
        told.log(i, {"reward": value, "seconds": 1}, "train")
    last = start + len(numbers)
    told.picture(last, picture(output, last))
    assert tracker in told.trackers  # it was not dropped on the way
    told.close()
    assert tracker in told.trackers


def test_records_become_flat_numbers():
    record = {"reward": 1, "families": {"two": 0.5}, "interval": [0, 1], "skipped": "x", "b": True}
    assert flatten(record, "e") == [("e/reward", 1.0), ("e/families/two", 0.5)]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell("tensorboard", tmp_path, 0, [0.1, 0.2, 0.9])
    tell("tensorboard", tmp_path, 2, [0.3])  # resumed after the second iteration
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Scalars("train/reward")
    assert [event.step for event in found] == [1, 2, 3]
    assert [event.value for event in found] == pytest.approx([0.1, 0.2, 0.3])
    image = events.Images("sample")[-1]
    assert (image.width, image.height) == (4, 3)
    assert "tiny-sd3" in str(events.Tensors("recipe/text_summary")[0].tensor_proto)


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell("wandb", tmp_path, 0, [0.25, 0.5])
    tell("wandb", tmp_path, 2, [0.75])
    wandb.teardown()  # as at the end of a process: its writer, another one, has finished
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert first.name.rsplit("-", 1)[1] == second.name.rsplit("-", 1)[1]  # one run, resumed
    rewards = [
        float(item.value_json)
        for folder in (first, second)
        for record in wandb_records(next(folder.glob("*.wandb")))
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
        if "train/reward" in (item.key, *item.nested_key)
    ]
    assert rewards == [0.25, 0.5, 0.75]
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/sample_*.png"))


def wandb_records(file):
    """The records of a .wandb file: 7 bytes, then LevelDB's log format around protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    block, data = 32768, file.read_bytes()
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # no header fits into the rest of a block
            at += block - at % block
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_mlflow_in_a_file(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tell("mlflow", tmp_path, 0, [0.25, 0.5])
    tell("mlflow", tmp_path, 2, [0.75])
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tdm-r1")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/reward")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizers.fake.lr"] == "0.001"
    assert [a.path for a in client.list_artifacts(run.info.run_id, "samples")] == [
        "samples/000002.png",
        "samples/000003.png",
    ]


def test_a_run_resumed_before_its_first_iteration_is_the_same_run(tmp_path, monkeypatch):
    seen = []

    class Known:
        def __init__(self, output, settings, iteration, *, resumed):
            seen.append(report._identity(output, "known", resumed, lambda: f"run-{len(seen)}"))

    monkeypatch.setitem(report.TRACKERS, "known", Known)
    for resumed in (False, True, False):
        Report(["known"], tmp_path, SETTINGS, 0, resumed=resumed)
    assert seen == ["run-0", "run-0", "run-2"]


@pytest.mark.parametrize("name", sorted(report.TRACKERS))
def test_what_is_not_installed_is_named_with_the_command(name, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=f"'{name}' is not installed; run: pip install {name}"):
        report.check([name])
    report.check([])


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    seen = []

    class Good:
        def __init__(self, output, settings, iteration, *, resumed):
            pass

        def log(self, iteration, numbers):
            seen.append((iteration, numbers))

        def close(self):
            seen.append("closed")

    class Bad(Good):
        def log(self, iteration, numbers):
            raise OSError("the server is gone")

    for name, made in (("bad", Bad), ("good", Good), ("worse", math.log)):
        monkeypatch.setitem(report.TRACKERS, name, made)
    with caplog.at_level(logging.WARNING):
        told = Report(["bad", "good", "worse"], tmp_path, SETTINGS, 0, resumed=False)
        told.log(1, {"reward": 1.0}, "train")
        told.log(2, {"reward": 2.0}, "train")
        told.close()
    assert seen == [(1, {"train/reward": 1.0}), (2, {"train/reward": 2.0}), "closed"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "worse is dropped" in messages[0]
    assert "bad is dropped, the run goes on: OSError('the server is gone')" in messages[1]
