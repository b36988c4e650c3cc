#!/usr/bin/env python3
"""Follows a run and writes what it measures to TensorBoard, Weights & Biases or MLflow, with their own clients.

    python3 deploy/trackers/follow.py runs/demo                    # to the trackers of `logging.tracking` in its job spec
    python3 deploy/trackers/follow.py runs/demo --to tensorboard
    python3 deploy/trackers/follow.py runs/demo --to wandb mlflow --project arithmetic
    pacs watch runs/demo | python3 deploy/trackers/follow.py - --to tensorboard --output elsewhere

It is a process next to the run, which needs no Python: when it fails or is stopped, the run does not notice, and the same command
continues after the last step that it wrote. W&B is written offline unless WANDB_MODE says otherwise (`wandb sync` uploads it); MLflow goes to
MLFLOW_TRACKING_URI, or to files in the output folder. The packages are tensorboard, wandb and mlflow (or mlflow-skinny) of PyPI.

Exit codes: 0 the run is over, 1 it cannot be followed, 2 usage or a missing package.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Exit code by which `pacs watch` says that another try may succeed.
AGAIN = 75
RETRY_SECONDS = 5.0
# Tries in a row without a line of output.
MOST_TRIES = 60
# Metrics that name the step and not a quantity.
NO_METRICS = {"step", "time", "version"}
# MLflow's limit of parameters in one call, and of characters in one.
MLFLOW_PARAMETERS = 100
MLFLOW_CHARACTERS = 500


def flattened(spec: dict, prefix: str = "") -> dict[str, object]:
    """The keys of a job spec, joined by dots."""
    flat: dict[str, object] = {}
    for key, value in spec.items():
        if isinstance(value, dict):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


class TensorBoard:
    """Event files in `OUTPUT/tensorboard/NAME`."""

    def __init__(self, output: Path, name: str, spec: dict, **_: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(output / "tensorboard" / name))
        self._text("job spec", json.dumps(spec, indent=2))

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        # Indented by four, Markdown shows it as it is.
        shown = "".join(f"    {line}\n" for line in text.splitlines())
        tensor = TensorProto(dtype=DT_STRING, string_val=[shown.encode()])
        value = self._summary.Value(tag=tag, metadata=create_summary_metadata("", ""), tensor=tensor)
        self._writer.add_event(self._event(wall_time=time.time(), step=0, summary=self._summary(value=[value])))

    def log(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=seconds, step=step, summary=self._summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, how: str) -> None:
        self._writer.close()


class WandB:
    """A run of W&B, offline unless the environment says otherwise."""

    def __init__(self, output: Path, name: str, spec: dict, project: str, **_: object) -> None:
        import wandb

        (output / "wandb").mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project=project, name=name, config=spec, dir=str(output), mode=mode, settings=wandb.Settings(silent=True))
        self._run.define_metric("evaluation/*", step_metric="trained_steps")

    def log(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        self._run.log({**metrics, "trained_steps": step, "time": seconds}, step=step)

    def flush(self) -> None:
        """W&B writes by itself."""

    def close(self, how: str) -> None:
        self._run.finish(exit_code=0 if how in ("finished", "stopped", "over") else 1)


class MLflow:
    """A run of MLflow. With a tracking server, its address is in MLFLOW_TRACKING_URI."""

    def __init__(self, output: Path, name: str, spec: dict, project: str, **_: object) -> None:
        # Newer versions ask for a database, unless they are told that files are wanted.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from mlflow.entities import Metric, Param

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri((output / "mlruns").resolve().as_uri())
        self._metric, self._client = Metric, mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        self._id = self._client.create_run(experiment, run_name=name).info.run_id
        parameters = [Param(key, str(value)[:MLFLOW_CHARACTERS]) for key, value in flattened(spec).items()]
        for first in range(0, len(parameters), MLFLOW_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MLFLOW_PARAMETERS])

    def log(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        milliseconds = int(seconds * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(name, value, milliseconds, step) for name, value in metrics.items()])

    def flush(self) -> None:
        """The client has sent everything."""

    def close(self, how: str) -> None:
        status = {"failed": "FAILED", "interrupted": "KILLED"}.get(how, "FINISHED")
        self._client.set_terminated(self._id, status=status)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def numbers(event: dict) -> dict[str, float]:
    """The finite metrics of an event, those of evaluations under a name of their own."""
    prefix = ""
    if event["event"] == "evaluation":
        of = event["fields"].get("set", "evaluation")
        prefix = "evaluation/" if of == "evaluation" else f"evaluation/{of}/"
    metrics = event["fields"].get("metrics", {})
    is_fine = lambda value: isinstance(value, (int, float)) and math.isfinite(value)
    return {prefix + name: float(value) for name, value in metrics.items() if name not in NO_METRICS and is_fine(value)}


def watched(program: str, run: str, after: int) -> Iterator[dict]:
    """The events of a run, across restarts of its coordinator."""
    tries = 0
    while True:
        command = [program, "watch", run, "--after", str(after)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "step":
                    after, tries = max(after, event["fields"]["step"]), 0
                yield event
                if event["event"] == "run_over":
                    return
        if process.returncode == 0:
            return
        tries += 1
        if process.returncode != AGAIN or tries > MOST_TRIES:
            sys.exit(f"`{' '.join(command)}` ended with exit code {process.returncode}")
        time.sleep(RETRY_SECONDS)


class Place:
    """The last step that was written, in the output folder."""

    def __init__(self, output: Path, name: str) -> None:
        self._path = output / f"{name}.followed"

    def read(self) -> int:
        try:
            return int(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def write(self, step: int) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(str(step))
        temporary.replace(self._path)


def follow(events: Iterator[dict], chosen: list[str], output: Path, project: str, place: Place | None) -> int:
    """Writes events to the trackers until they end; returns the number of steps and evaluations."""
    trackers, written, how = [], 0, "over"
    try:
        for event in events:
            fields = event["fields"]
            if event["event"] == "run" and not trackers:
                name, spec = fields["name"], fields["spec"] or {}
                chosen = chosen or spec.get("logging", {}).get("tracking", [])
                if not chosen:
                    sys.exit("nowhere to write: pass --to, or set `logging.tracking` in the job spec")
                for kind in chosen:
                    trackers.append(TRACKERS[kind](output=output, name=name, spec=spec, project=project))
            elif event["event"] in ("step", "evaluation"):
                for tracker in trackers:
                    tracker.log(fields["step"], event["time"] or time.time(), numbers(event))
                    tracker.flush()
                written += 1
                if place and event["event"] == "step":
                    place.write(fields["step"])
            elif event["event"] == "run_over":
                how = fields["how"]
    finally:
        for tracker in trackers:
            tracker.close(how)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run, as `pacs watch` takes it, or - for its output on standard input")
    parser.add_argument("--to", nargs="+", choices=sorted(TRACKERS), default=[], help="where to write (default: `logging.tracking` of the job spec)")
    parser.add_argument("--output", type=Path, default=Path("trackers"), help="folder of the files (default: trackers)")
    parser.add_argument("--project", default="pacs", help="project of W&B, experiment of MLflow (default: pacs)")
    parser.add_argument("--pacs", default="pacs", help="the `pacs` program (default: on PATH)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.run == "-":
            events, place = (json.loads(line) for line in sys.stdin), None
        else:
            place = Place(arguments.output, Path(arguments.run).name.replace(":", "-"))
            events = watched(arguments.pacs, arguments.run, place.read())
        written = follow(events, arguments.to, arguments.output, arguments.project, place)
    except ImportError as error:
        print(f"{error}; install it with `pip install {' '.join(arguments.to or TRACKERS)}`", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"{error}; --pacs names the program", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    print(f"{written} steps and evaluations written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
