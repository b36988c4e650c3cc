"""A verifier under which about half of the answers of any model are right: what its samples are worth does not matter to `prove.py`,
that they differ does, for otherwise nothing would be trained."""

import json
import sys
import zlib

print(json.dumps({"pacs_verifier": 1, "version": "half 1"}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    right = zlib.crc32(task["response"].encode()) % 2 == 0
    print(json.dumps({"id": task["id"], "outcome": "correct" if right else "wrong"}), flush=True)
