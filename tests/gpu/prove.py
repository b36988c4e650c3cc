"""Runs what there is to show on a GPU, the most important first, and prints one table with verdicts.

`prove.sh` next to this file finds libtorch and calls it. Needs nothing but the standard library. Each check is a program of this
repository; what it printed is kept in OUT. Exit code 0: nothing failed, 1: something did.
"""

import argparse
import glob
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Bytes a second of the memory of the GPU on which others were measured (an H100), and of others by name.
H100 = 3.35e12
BANDWIDTHS = {"H200": 4.8e12, "H100 NVL": 3.9e12, "H100": H100, "A100-SXM4-80": 2.04e12, "A100": 1.55e12, "B200": 8.0e12}
# Tokens a second that were measured on one H100 (docs/PERFORMANCE.md, "On a GPU"): the best of vLLM for 32 x 8 samples of 256
# tokens after prompts of 256, and eager PyTorch for a training step of packed sequences.
ROLLOUT = {"qwen2.5-0.5b": 38e3, "qwen2.5-1.5b": 27e3, "qwen2.5-7b": 22.4e3}
TRAINING = {"qwen2.5-0.5b": 61.9e3, "qwen2.5-1.5b": 30.0e3}
# Times the floor of the memory's bandwidth, at 256 rows: the goal.
DECODE = {"qwen2.5-0.5b": 2.2, "qwen2.5-1.5b": 1.5, "qwen2.5-7b": 1.3}
# Mean difference of log-probs between rollout and learner in bfloat16, nats: the alert's bound.
MISMATCH = 0.05

JOB = """
name = "prove"
model = { path = "%(model)s", precision = "bfloat16" }
data = { prompt_suffix = "", train = { generator = { task = "addition", low = 10, high = 99, held_out = 50, part = "train" } } }
rollout = { samples_per_prompt = 8, max_new_tokens = %(tokens)d }
verifier = { kind = "exec", command = ["python3", "%(verifier)s"] }
batch = { prompts_per_step = %(prompts)d, steps = %(steps)d, mini_batches = 1 }
optimizer = { learning_rate = 1e-5 }
evaluation = { before = false, after = false, every_steps = 0 }
checkpoint = { every_steps = 0 }
resources = { device = "%(device)s", rollouts = 1, learners = 1, verifiers = 1%(share)s }
"""


class Skipped(Exception):
    """A part is not there that this check needs."""


class Failed(Exception):
    """What was to be shown is not so."""


class Prover:
    def __init__(self, arguments):
        self.arguments = arguments
        self.on_gpu = arguments.device == "cuda"
        self.out = pathlib.Path(arguments.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + arguments.seconds
        self.lines = open(self.out / "prove.jsonl", "w")
        self.rows = []
        self.device = {}
        os.environ["PACS_GOLDEN"] = str(ROOT / "tests" / "golden")

    # Where programs are

    def program(self, name):
        for folder in (ROOT / "bin", ROOT / "target" / "release"):
            if (folder / name).is_file():
                return str(folder / name)
        raise Skipped(f"there is no program {name}")

    def test_program(self, name, holds=""):
        """The newest test program of a name, that of the bundle first; several crates may have one of the same name."""
        bundled = ROOT / "bin" / "tests" / name
        if bundled.is_file():
            return str(bundled)
        name = name.split(".")[-1]
        found = [path for path in glob.glob(str(ROOT / "target/release/deps" / f"{name}-*")) if re.search(r"-[0-9a-f]{16}$", path)]
        found.sort(key=os.path.getmtime, reverse=True)
        for path in found:
            listed = subprocess.run([path, "--list"], capture_output=True, text=True).stdout
            if holds in listed:
                return path
        raise Skipped(f"there is no test program {name}")

    # How they are run

    def run(self, name, command, seconds, **options):
        """Output of a program that has to end well within its time and ours."""
        left = self.deadline - time.monotonic()
        if left < 5:
            raise Skipped("no time left")
        log = self.out / f"{name}.log"
        with open(log, "w") as output:
            try:
                ended = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=min(seconds, left), **options
                )
            except subprocess.TimeoutExpired:
                raise Failed(f"not done within {min(seconds, left):.0f} s, see {log}")
        text = log.read_text(errors="replace")
        if ended.returncode != 0:
            # The line that says why: what a test panicked with, or else the last one.
            said = [line.strip() for line in text.splitlines() if line.strip()]
            why = next((line for line in said if "panicked at" in line or line.startswith("error")), said[-1] if said else "")
            raise Failed(f"exit code {ended.returncode}: {why[:200]} (see {log})")
        return text

    def json_lines(self, text):
        lines = (line for line in text.splitlines() if line.startswith("{"))
        return [json.loads(line) for line in lines]

    def tests(self, name, program, filters, seconds, holds=""):
        text = self.run(name, [self.test_program(program, holds), *filters, "--nocapture", "--test-threads=1"], seconds)
        passed = sum(int(number) for number in re.findall(r"(\d+) passed", text))
        if passed == 0:
            raise Failed("no test was run")
        skipped = [line for line in text.splitlines() if re.match(r"(skipped|SKIPPED|emulated alone)", line)]
        if skipped and self.on_gpu:
            raise Failed(f"a test skipped the GPU: {skipped[0][:160]}")
        return f"{passed} tests", None, None

    def check(self, name, work):
        started = time.monotonic()
        row = {"check": name, "verdict": "pass", "figure": "", "beat": "", "detail": ""}
        try:
            figure, beat, good = work()
            row.update(figure=figure or "", beat=beat or "")
            if good is False:
                row["verdict"] = "MISSED"
        except Skipped as skipped:
            row.update(verdict="skip", detail=str(skipped))
        except Failed as failed:
            row.update(verdict="FAIL", detail=str(failed))
        except (KeyError, IndexError, ValueError, AttributeError, OSError) as error:
            # A program that says something else than it used to is a failure of its check, and of no other.
            row.update(verdict="FAIL", detail=f"{type(error).__name__}: {error}")
        row["seconds"] = round(time.monotonic() - started, 1)
        self.rows.append(row)
        print(json.dumps(row), file=self.lines, flush=True)
        if self.arguments.json:
            print(json.dumps(row), flush=True)
        else:
            print(self.text(row), flush=True)

    @staticmethod
    def text(row):
        line = f"{row['check']:<24} {row['verdict']:<7} {row['seconds']:>6.1f} s  {row['figure']:<34} {row['beat']:<26} {row['detail']}"
        return line.rstrip()

    # What is shown

    def devices(self):
        if not self.on_gpu:
            return "rehearsed on processors", None, None
        text = self.run("devices", [self.program("pacs-worker"), "devices", "--json"], 60)
        [found] = self.json_lines(text)
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            named = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
        except (OSError, subprocess.TimeoutExpired):
            named = []
        name = named[0].strip() if named else "unknown"
        self.device = {"name": name, "bandwidth": next((b for part, b in BANDWIDTHS.items() if part in name), None)}
        print(json.dumps({"device": name, **found}), file=self.lines, flush=True)
        return f"{name}, compute capability {found['compute_capability']}", None, None

    def scale(self):
        """How much faster this GPU's memory is than that of the one that others were measured on."""
        return (self.device.get("bandwidth") or H100) / H100

    def bench(self, name, arguments, seconds):
        device = ["--device", self.arguments.device, "--precision", "bfloat16" if self.on_gpu else "auto"]
        text = self.run(name, [self.program("pacs-worker"), "bench", *arguments, *device], seconds)
        return [line for line in self.json_lines(text) if "bench" in line]

    def decode(self, shape):
        size = ["--batch", "256", "--context", "384"] if self.on_gpu else ["--batch", "2", "--context", "16", "--steps", "3"]
        if self.arguments.bandwidth:
            size += ["--bandwidth", str(self.arguments.bandwidth)]
        line = self.bench(f"decode-{shape}", ["decode", "--shape", shape, *size], 90)[-1]
        times, goal = line["times_the_floor"], DECODE.get(shape)
        if self.on_gpu and not (line["device_kernels"] and line["cuda_graphs"]):
            raise Failed("kernels or graphs were not used")
        share = 100 * line["bytes_per_second"] / line["memory_bytes_per_second"]
        figure = f"{line['ms_per_step']:.2f} ms, {times:.2f} x the floor, {share:.0f} %"
        return figure, f"{goal} x the floor" if goal else None, times <= goal if self.on_gpu and goal else None

    def rollout(self, shape):
        size = (
            ["--groups", "32", "--samples", "8", "--prompt-tokens", "256", "--new-tokens", "256", "--repeats", "2"]
            if self.on_gpu
            else ["--groups", "1", "--samples", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1"]
        )
        # A line each time, and then one of all.
        line = self.bench(f"rollout-{shape}", ["rollout", "--shape", shape, *size], 90)[-1]
        return self.beside(line["tokens_per_second"], ROLLOUT.get(shape), "vLLM")

    def train(self, shape):
        size = (
            ["--groups", "32", "--samples", "2", "--prompt-tokens", "128", "--answer-tokens", "256", "--steps", "3"]
            if self.on_gpu
            else ["--groups", "1", "--samples", "2", "--prompt-tokens", "8", "--answer-tokens", "4", "--steps", "1"]
        )
        lines = self.bench(f"train-{shape}", ["train", "--shape", shape, *size], 90)
        last = lines[-1]
        used = [line["metrics"].get("memory_used_bytes", 0) for line in lines if "metrics" in line]
        figure, beat, good = self.beside(last["sequence_tokens_per_second"], TRAINING.get(shape), "eager")
        return f"{figure}, {max(used, default=0) / 2**30:.1f} GiB", beat, good

    def beside(self, found, peer, name):
        figure = f"{found:,.0f} tok/s".replace(",", " ")
        if not (self.on_gpu and peer):
            return figure, None, None
        wanted = peer * self.scale()
        return figure, f"{name} {wanted:,.0f}".replace(",", " "), found >= wanted

    def sanitizer(self):
        program = shutil.which("compute-sanitizer") or next(iter(glob.glob("/usr/local/cuda*/bin/compute-sanitizer")), None)
        if program is None or not self.on_gpu:
            raise Skipped("there is no compute-sanitizer" if program is None else "it looks at GPUs alone")
        tests = self.test_program("pacs_torch", "cuda::tests")
        filters = ["cuda::tests::attention", "cuda::tests::norms", "cuda::train_tests::backwards"]
        text = self.run("sanitizer", [program, "--error-exitcode", "9", tests, *filters, "--test-threads=1"], 120)
        return re.search(r"ERROR SUMMARY: .*", text).group(0).lower(), None, None

    def model(self):
        """The folder of a model to train."""
        if self.arguments.model:
            return pathlib.Path(self.arguments.model).resolve()
        folder = self.out / "model"
        shutil.rmtree(folder, ignore_errors=True)
        heads = ["--layers", "4", "--hidden", "384", "--heads", "6"] if self.on_gpu else []
        self.run("create", [self.program("pacs-worker"), "create", str(folder), *heads], 60)
        return folder

    def train_for_real(self):
        steps, prompts, tokens = (20, 16, 32) if self.on_gpu else (2, 2, 8)
        text = JOB % {
            "model": self.model(),
            "verifier": HERE / "half.py",
            "tokens": tokens,
            "prompts": prompts,
            "steps": steps,
            "device": self.arguments.device,
            "share": ", share_gpus = true" if self.on_gpu else "",
        }
        job, run_dir = self.out / "job.toml", self.out / "run"
        job.write_text(text)
        shutil.rmtree(run_dir, ignore_errors=True)
        command = [self.program("pacs"), "run", str(job), "--run-dir", str(run_dir), "--worker-binary", self.program("pacs-worker")]
        self.run("run", command, 150)
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        metrics = [line for line in metrics if "step" in line and "seconds_update" in line]
        if len(metrics) != steps:
            raise Failed(f"{len(metrics)} of {steps} steps are in the metrics")
        apart = [line["logprob_mismatch_mean"] for line in metrics if "logprob_mismatch_mean" in line]
        if not apart:
            raise Failed("no step compared log-probs of rollout and learner")
        if not all(math.isfinite(line.get("loss", 0.0)) for line in metrics):
            raise Failed("a loss is not finite")
        self.published = statistics.median(line["seconds_publish"] for line in metrics)
        worst = max(apart)
        return f"{steps} steps, mismatch {statistics.mean(apart):.4f}, {worst:.4f} at most", f"{MISMATCH}", worst <= MISMATCH

    def weights(self):
        if not hasattr(self, "published"):
            raise Skipped("no run has published weights")
        return f"{self.published * 1e3:.1f} ms to publish a version", None, None

    def all(self):
        shapes = ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"] if self.on_gpu else ["smollm2-135m"]
        yield "devices", self.devices
        yield "kernels", lambda: self.tests("kernels", "pacs_torch", ["cuda::", "product::", "dispatch::"], 150, "cuda::tests")
        yield "graphs", lambda: self.tests("graphs", "pacs_torch", ["graph::"], 60, "cuda::tests")
        yield "flash attention", lambda: self.tests("flash", "torch.flash", [], 60, "")
        yield "gradients", lambda: self.tests("gradients", "model.gpu", ["gradients"], 60, "gradients_are_those")
        yield "generation", lambda: self.tests("generation", "rollout.gpu", ["log_probs"], 90, "log_probs_are_those")
        yield "NCCL", lambda: self.tests("nccl", "pacs_collective", ["nccl::"], 90, "a_real_device_does_all_of_it")
        for shape in shapes:
            yield f"decode {shape}", lambda shape=shape: self.decode(shape)
        yield "PACS, end to end", self.train_for_real
        yield "weights", self.weights
        for shape in shapes[:2]:
            yield f"train {shape}", lambda shape=shape: self.train(shape)
        for shape in shapes:
            yield f"rollout {shape}", lambda shape=shape: self.rollout(shape)
        yield "compute-sanitizer", self.sanitizer

    def prove(self):
        only = self.arguments.only
        for name, work in self.all():
            if not only or any(part in name for part in only):
                self.check(name, work)
        if not self.arguments.json:
            print(f"\n{'check':<24} {'verdict':<7} {'time':>8}  {'found':<34} {'to beat':<26}")
            for row in self.rows:
                print(self.text(row))
        verdicts = [row["verdict"] for row in self.rows]
        summary = {verdict: verdicts.count(verdict) for verdict in ("pass", "MISSED", "skip", "FAIL")}
        summary = {"summary": summary, "device": self.device.get("name", self.arguments.device), "out": str(self.out)}
        print(json.dumps(summary), file=self.lines, flush=True)
        print(json.dumps(summary))
        return 1 if "FAIL" in verdicts else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal of every line")
    parser.add_argument("--seconds", type=float, default=480, help="most that all of it may take; what is left is skipped")
    parser.add_argument("--model", help="a Hugging Face folder to train for 20 steps (default: a small one of random weights)")
    parser.add_argument("--bandwidth", type=float, help="GB/s of the memory, for the floor of decoding (default: measured)")
    parser.add_argument("--out", default="prove-out", help="where logs, the run and prove.jsonl go")
    parser.add_argument("--only", action="append", help="checks whose name holds this; may be repeated")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    sys.exit(Prover(parser.parse_args()).prove())


if __name__ == "__main__":
    main()
