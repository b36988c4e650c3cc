# Grades the pairs of a file with math-verify: once for the verdicts, then for the time. Prints one JSON object.
import json
import logging
import re
import sys
import time

logging.disable(logging.CRITICAL)
from math_verify import parse, verify


def read(text):
    # A bare answer is put into a box, as trainers do with reference answers; numbers are read as they are.
    marks = ("$", "\\boxed", "\\(", "\\[")
    is_bare = not any(mark in text for mark in marks) and not re.fullmatch(r"-?[\d,.]+", text.strip())
    return parse("\\boxed{" + text + "}" if is_bare else text)


def grade(row):
    try:
        pred = read(row["pred"]) if row.get("kind") == "answer" else parse(row["pred"])
        return bool(verify(read(row["gold"]), pred))
    except Exception:
        return False


rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
correct = [grade(row) for row in rows]
times = []
started = time.perf_counter()
while time.perf_counter() - started < float(sys.argv[2]):
    for row in rows:
        begun = time.perf_counter()
        grade(row)
        times.append(time.perf_counter() - begun)
        # Unlike a pass of the other grader, one of this may take longer than the time allows.
        if time.perf_counter() - started >= float(sys.argv[2]) and len(times) >= len(rows):
            break
total = time.perf_counter() - started
times.sort()


def quantile(q):
    return round(times[int((len(times) - 1) * q)] * 1e6, 2)


print(
    json.dumps(
        {
            "grader": "math-verify",
            "verdicts": len(times),
            "verdicts_per_second": round(len(times) / total, 1),
            "p50_us": quantile(0.5),
            "p99_us": quantile(0.99),
            "max_us": quantile(1.0),
            "correct": correct,
        }
    )
)
