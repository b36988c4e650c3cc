"""An objective of your own: every right answer of a prompt above every wrong one, by a logistic loss of their log-ratios.

    [objective]
    kind = "external"
    command = ["python3", "deploy/objectives/pairwise.py", "0.5"]

One line of JSON comes in for every optimizer update, and one goes out:

    {"step": 3, "update": 0, "answers": [{"group": 17, "label": 1.0, "reward": 1.0, "tokens": 12, "truncated": false,
                                          "new": -8.1, "old": -8.3, "rollout": -8.3}, ...]}
    {"losses": [0.02, ...], "coefficients": [-0.01, ...]}

`answers` are those of the mini-batch on all ranks, whole groups. `new`, `old` and `rollout` are sums of the log-probs of an
answer's tokens in nats: under the policy being trained, under that of the start of the step, and as the rollout engine drew them.
`losses` add up to the loss that is reported. A coefficient is the derivative of the loss by the log-prob of any one token of
the answer; all tokens of an answer share it, so it is also the derivative by the sum `new`. The derivatives are yours to get
right: compare them with differences of the loss before a run. `{"error": "..."}` ends the run with these words.

Only rank 0 asks, and all ranks hear the same, so random numbers do no harm. Whatever is printed among the answers breaks
the exchange: write to standard error, which is in the log of the learner.
"""

import json
import math
import sys


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def pairwise(answers, beta):
    """Losses and coefficients: the mean over groups of the mean over pairs of `softplus(-(s_right - s_wrong))`."""
    losses, coefficients = [0.0] * len(answers), [0.0] * len(answers)
    groups = {}
    for place, answer in enumerate(answers):
        groups.setdefault(answer["group"], []).append(place)
    for members in groups.values():
        right = [i for i in members if answers[i]["label"] > 0.5]
        wrong = [i for i in members if answers[i]["label"] <= 0.5]
        for i in right:
            for j in wrong:
                share = 1 / (len(right) * len(wrong) * len(groups))
                apart = beta * (answers[i]["new"] - answers[i]["old"] - answers[j]["new"] + answers[j]["old"])
                push = beta * share * sigmoid(-apart)
                for place, sign in ((i, -1), (j, 1)):
                    losses[place] += share * softplus(-apart) / 2
                    coefficients[place] += sign * push
    return losses, coefficients


def main():
    beta = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    for line in sys.stdin:
        losses, coefficients = pairwise(json.loads(line)["answers"], beta)
        # Flushed, for the learner waits for the line.
        print(json.dumps({"losses": losses, "coefficients": coefficients}), flush=True)


if __name__ == "__main__":
    main()
