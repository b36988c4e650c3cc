#!/usr/bin/env python3
"""math-verify as a verifier of a job: `[verifier] kind = "exec"`, see docs/VERIFIERS.md.

Install it where the verifier workers run: pip install "math-verify[antlr4_13_2]==0.9.0"

One JSON object a line comes in, one goes out. What fails here is reported as failed and never as a wrong answer; there
is no time limit in here, for the worker kills a verification that is late.
"""

import functools
import json
import logging
import re
import sys
from importlib.metadata import version

from math_verify import parse, verify

# Whatever a library prints goes to the log; the protocol has standard output to itself.
protocol, sys.stdout = sys.stdout, sys.stderr
# It warns that its own time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)
# An escaped dollar sign is money.
DELIMITED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")


def say(message):
    protocol.write(json.dumps(message) + "\n")
    protocol.flush()


def read(text):
    """The readings of a text: expressions, and last the text that they were read from."""
    return parse(text, parsing_timeout=0, raise_on_error=True)


@functools.lru_cache(maxsize=4096)
def read_gold(gold):
    """A reference answer is a bare answer, unless it has delimiters; the samples of a group share it."""
    readings = read(gold if DELIMITED.search(gold) else "\\boxed{" + gold + "}")
    if not readings:
        raise ValueError(f"reference answer {gold!r} cannot be read")
    return readings


def judge(request):
    gold = read_gold(request["gold"])
    found = read(request["response"])
    if not found:
        return {"outcome": "unparsable", "rule": "no answer"}
    equal = verify(gold, found, timeout_seconds=None, raise_on_error=True)
    return {"outcome": "correct" if equal else "wrong", "extracted": str(found[-1]), "rule": "math-verify"}


def main():
    say({"pacs_verifier": 1, "version": "math-verify " + version("math-verify")})
    # Ends when the worker closes its end, or dies.
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict = judge(request)
        except Exception as error:
            verdict = {"outcome": "failed", "rule": f"{type(error).__name__}: {error}"[:500]}
        say({"id": request["id"], **verdict})


if __name__ == "__main__":
    main()
