"""What the trackers' own readers see of a followed run. A tracker whose package is missing is skipped, aloud.

    python3 -m unittest discover -s deploy/trackers -v
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

FOLLOW = Path(__file__).with_name("follow.py")
STEPS = 20


def lines() -> str:
    """The output of `pacs watch` of a short run."""
    spec = {"logging": {"tracking": ["tensorboard"]}, "name": "short", "batch": {"steps": STEPS}, "objective": {"kind": "pacs"}}
    events = [{"number": 0, "time": None, "event": "run", "fields": {"name": "short", "live": False, "folder": None, "spec": spec}}]
    for step in range(1, STEPS + 1):
        metrics = {"step": step, "time": 1.7e9 + step, "reward_mean": step / STEPS, "loss": None}
        events.append({"number": 0, "time": 1.7e9 + step, "event": "step", "fields": {"step": step, "metrics": metrics}})
    evaluation = {"step": STEPS, "metrics": {"pass_at_1": 0.75}}
    events.append({"number": 0, "time": 1.7e9 + STEPS, "event": "evaluation", "fields": evaluation})
    of_set = {"step": STEPS, "set": "hard", "metrics": {"pass_at_1": 0.25}}
    events.append({"number": 0, "time": 1.7e9 + STEPS, "event": "evaluation", "fields": of_set})
    events.append({"number": 9, "time": 1.7e9 + STEPS, "event": "run_over", "fields": {"how": "finished", "reason": ""}})
    return "".join(json.dumps(event) + "\n" for event in events)


def follow(output: str, *to: str) -> str:
    command = [sys.executable, str(FOLLOW), "-", "--output", output, *(["--to", *to] if to else [])]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment.update(WANDB_MODE="offline", HOME=output)
    done = subprocess.run(command, input=lines(), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(data: bytes):
    """The records of a W&B file: a log of LevelDB, with a header of seven bytes. It has no reader in the package's interface."""
    block, place, parts = 32768, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        # 1 and 4 end a record: a whole one, and the last part of one.
        if kind in (1, 4):
            yield parts
            parts = b""


def needs(package: str):
    return unittest.skipUnless(importlib.util.find_spec(package), f"the package {package} is not installed")


class Trackers(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.output = folder.name

    @needs("tensorboard")
    def test_tensorboard_reads_the_event_files(self) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # Named by `logging.tracking` of the job spec.
        self.assertIn("22 steps and evaluations", follow(self.output))
        read = EventAccumulator(str(Path(self.output) / "tensorboard" / "short"))
        read.Reload()
        reward = read.Scalars("reward_mean")
        self.assertEqual([event.step for event in reward], list(range(1, STEPS + 1)))
        self.assertAlmostEqual(reward[-1].value, 1.0)
        self.assertAlmostEqual(reward[0].wall_time, 1.7e9 + 1)
        self.assertAlmostEqual(read.Scalars("evaluation/pass_at_1")[0].value, 0.75)
        self.assertAlmostEqual(read.Scalars("evaluation/hard/pass_at_1")[0].value, 0.25)
        self.assertNotIn("loss", read.Tags()["scalars"], "what is no number is left out")
        self.assertIn("job spec", read.Tags()["tensors"])

    @needs("mlflow")
    def test_mlflow_reads_the_run(self) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow

        follow(self.output, "mlflow")
        client = mlflow.MlflowClient(tracking_uri=(Path(self.output) / "mlruns").resolve().as_uri())
        experiment = client.get_experiment_by_name("pacs")
        (run,) = client.search_runs([experiment.experiment_id])
        self.assertEqual((run.info.run_name, run.info.status), ("short", "FINISHED"))
        self.assertEqual(run.data.params["objective.kind"], "pacs")
        self.assertAlmostEqual(run.data.metrics["evaluation/pass_at_1"], 0.75)
        history = client.get_metric_history(run.info.run_id, "reward_mean")
        self.assertEqual([metric.step for metric in history], list(range(1, STEPS + 1)))

    @needs("wandb")
    def test_wandb_has_every_step_in_its_offline_file(self) -> None:
        from wandb.proto import wandb_internal_pb2

        follow(self.output, "wandb")
        (file,) = Path(self.output).glob("wandb/offline-run-*/run-*.wandb")
        rewards, exits = {}, []
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                if "reward_mean" in items:
                    rewards[items["trained_steps"]] = items["reward_mean"]
            if record.HasField("exit"):
                exits.append(record.exit.exit_code)
        self.assertEqual(sorted(rewards), list(range(1, STEPS + 1)))
        self.assertAlmostEqual(rewards[STEPS], 1.0)
        self.assertEqual(exits, [0])


if __name__ == "__main__":
    unittest.main()
