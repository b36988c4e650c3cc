#!/usr/bin/env python3
"""A verifier of your own: grades `Write one sentence of exactly N words with the word W in it`.

The reference answer is `N W`. The protocol is one JSON object per line on standard input and output (docs/VERIFIERS.md). The
label, which PACS trains on, is 1 for a correct answer and 0 for any other. The reward is finer: half for the word, half for
the length, less by a quarter for each word too many or too few. Objectives such as GRPO train on it; PACS reports it.
"""

import json
import re
import sys

# Standard output belongs to the protocol; whatever else is printed goes to the worker's log.
protocol, sys.stdout = sys.stdout, sys.stderr


def say(message):
    protocol.write(json.dumps(message) + "\n")
    protocol.flush()


def judge(response, gold):
    count, word = gold.split()
    wanted = int(count)
    words = re.findall(r"[\w'-]+", response.lower())
    if not words:
        return {"outcome": "unparsable", "rule": "no words"}
    has_word = word.lower() in words
    off = abs(len(words) - wanted)
    reward = 0.5 * has_word + max(0.0, 0.5 - 0.25 * off)
    rule = f"{len(words)} of {wanted} words, {'with' if has_word else 'without'} {word}"
    return {"outcome": "correct" if has_word and off == 0 else "wrong", "reward": reward, "rule": rule}


def main():
    say({"pacs_verifier": 1, "version": "sentences 1"})
    for line in sys.stdin:
        task = json.loads(line)
        try:
            verdict = judge(task["response"], task["gold"])
        except Exception as error:
            # A reference answer that cannot be read is no fault of the sample: the verification failed, and no label is given.
            verdict = {"outcome": "failed", "rule": f"{type(error).__name__}: {error}"}
        say({"id": task["id"], **verdict})


if __name__ == "__main__":
    main()
