"""The programs of PACS. Nothing here computes: each function replaces the interpreter by a program.

So signals reach the program itself, and its exit code is the command's.
"""

import os
import sys


def _start(name):
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bin", name)
    # The start script of the worker looks for torch where this interpreter finds it, and `pacs demo` uses its pip.
    os.environ.setdefault("PACS_PYTHON", sys.executable)
    os.execv(program, [program, *sys.argv[1:]])


def control():
    """Starts `pacs`."""
    _start("pacs")


def worker():
    """Starts `pacs-worker`."""
    _start("pacs-worker")
