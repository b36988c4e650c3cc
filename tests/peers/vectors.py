"""Writes `tests/golden/objectives.json`: losses and derivatives of the objectives by plain PyTorch in float64.

    python3 tests/peers/vectors.py tests/golden/objectives.json

Inputs are drawn from one seed. The formulas are those of `objectives.py`, which autograd differentiates.
"""

import json
import random
import sys

import objectives
import torch

LENGTH = 16

CASES = [
    {"kind": "rloo"},
    {"kind": "weighted_rloo"},
    {"kind": "weighted_rloo", "pass_exponent": 0.5, "fail_exponent": 2.0},
    {"kind": "maxrl"},
    {"kind": "maxrl", "clip_low": 0.05, "clip_high": 0.05, "dual_clip": 0.0},
    {"kind": "cispo"},
    {"kind": "cispo", "clip_low": 0.1, "clip_high": 0.1, "importance": "mask", "importance_cap": 1.3},
    {"kind": "dppo", "clip_low": 0.05, "clip_high": 0.05},
    {"kind": "dppo", "divergence": "kl", "clip_low": 0.01, "clip_high": 0.02, "ratio_cap": 1.1},
    {"kind": "real"},
    {"kind": "real", "tau": 0.1},
    {"kind": "disco"},
    {"kind": "disco", "tau": 0.3, "constraint_delta": 0.05, "constraint_penalty": 10.0},
    {"kind": "pacs"},
    {"kind": "pacs", "importance": "truncate", "importance_cap": 1.2},
    {"kind": "pacs", "importance": "mask", "importance_level": "geometric", "importance_cap": 1.1, "beta": 2.0},
    {"kind": "grpo", "importance": "truncate", "importance_level": "geometric", "importance_cap": 1.05},
]

# Labels by group: mixed, one right, all right, none right, graded.
LABELS = [[1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1], [0, 0, 0], [0.2, 0.2, 0.4, 0.9]]


def drawn(seed):
    draw = random.Random(seed)
    number = lambda low, high: round(draw.uniform(low, high), 4)
    rows = []
    for group, labels in enumerate(LABELS):
        for label in labels:
            tokens = draw.randint(1, 5)
            new = [number(-3, -0.05) for _ in range(tokens)]
            old = [round(x + number(-0.4, 0.4), 4) for x in new]
            # Log-probs of probabilities: below 0.
            rollout = [round(min(x + number(-0.2, 0.2), -0.01), 4) for x in old]
            reward = label + round(draw.random() / 4, 4) if group == 1 else label
            rows.append({"group": group, "label": label, "reward": reward, "new": new, "old": old, "rollout": rollout})
    return rows


def tensors(rows):
    made = []
    for row in rows:
        numbers = {name: torch.tensor(row[name], dtype=torch.float64) for name in ("new", "old", "rollout")}
        numbers["new"].requires_grad_()
        extra = {"truncated": False, "tokens": row["new"], "entropies": torch.zeros(len(row["new"]))}
        made.append(row | numbers | extra)
    return made


def expected(objective, rows):
    s, rows = objectives.settings(objective), tensors(rows)
    of_answers = objectives.ANSWER_LOSSES.get(s["kind"])
    if of_answers:
        loss = of_answers(rows, s)
    else:
        objectives.set_advantages(rows, s)
        loss = objectives.policy_loss(rows, s, LENGTH)
    loss.backward()
    return {"loss": loss.item(), "dloss_dlogprob": [row["new"].grad.tolist() for row in rows]}


def main():
    rows = drawn(20)
    cases = [{"objective": case, "expect": expected(case, rows)} for case in CASES]
    with open(sys.argv[1], "w") as file:
        json.dump({"max_new_tokens": LENGTH, "answers": rows, "cases": cases}, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
