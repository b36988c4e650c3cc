"""Learning curves of finished runs, side by side: mean and deviation over seeds of 5-step means of the reward.

    python tests/peers/curves.py runs/compare

Takes every folder `NAME-SEED` below the given one that holds a `metrics.jsonl`, and prints one row a NAME. Needs Python
3.9, nothing else.
"""

import argparse
import json
import pathlib
import statistics

STEPS = (1, 5, 10, 15, 20, 30, 40)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def spread(values):
    if not values:
        return "-"
    deviation = f"±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def near(rewards, step):
    """Mean reward of the five steps around `step`, as far as they were made."""
    around = [reward for at, reward in rewards.items() if abs(at - step) <= 2]
    return statistics.mean(around) if step in rewards else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    runs = {}
    for path in sorted(parser.parse_args().folder.glob("*-*/metrics.jsonl")):
        runs.setdefault(path.parent.name.rpartition("-")[0], []).append(path.parent)
    if not runs:
        parser.error("no folder NAME-SEED with a metrics.jsonl in it")
    print("| run | seeds | " + " | ".join(f"step {step}" for step in STEPS) + " | held-out before | after |")
    print("|---" * (len(STEPS) + 4) + "|")
    for name, folders in runs.items():
        rewards = [{line["step"]: line["reward_mean"] for line in lines(f / "metrics.jsonl")} for f in folders]
        curve = [spread([r for run in rewards if (r := near(run, step)) is not None]) for step in STEPS]
        held_out = [[line["pass_at_1"] for line in lines(f / "evaluations.jsonl")] for f in folders]
        ends = [spread([rates[at] for rates in held_out if len(rates) > 1]) for at in (0, -1)]
        print("| " + " | ".join([name, str(len(folders)), *curve, *ends]) + " |")


if __name__ == "__main__":
    main()
