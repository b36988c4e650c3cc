"""Decides tests of a program in a process that the program never ran in.

An assertion from which all calls of the program can be taken beforehand is split: `cut` says which expressions the program has to
evaluate, its outermost calls, and `judged` puts the values that it claims in their place.

Any other test is replayed: one that calls the program within a comprehension, a lambda or a helper function, that passes one of its
functions to another function, or that has several statements. `Replay` makes requests of the program's expressions, and a `Run` runs
the test with the answers that are known so far. A call without an answer is noted, and the test runs again when the program has
answered. From the first such call on, a run speculates: it only looks for further calls, with placeholders for what they return, and
its result is not used.

Only plain data crosses. Calls leave as text with literals of Python, and answers come back as JSON with the kinds of Python. An object
of the program's stays with the program: it can be called, by another request, and takes part in no comparison.

Reads one JSON text on standard input, and writes one.
"""

import ast, builtins, collections, contextlib, copy, json, keyword, math, random, re, signal, sys, textwrap, types

# Of one test; each call is a process of the program.
MOST_CALLS = 256
# Of the calls that one test asks for at once, and that all tests ask for at once, in bytes of JSON.
MOST_BYTES, MOST_BYTES_TOGETHER = 1 << 19, 3 << 20
# Of values within values, in what is sent.
MOST_DEPTH = 50
# Processor time of a run after its first call without an answer.
SPECULATION_SECONDS = 1.0

# Modules that tests name without importing them.
MODULES = "cmath collections copy datetime decimal fractions functools itertools json math operator pytest random re statistics".split()

PLAIN = (str, bytes, bool, int, float, complex, list, tuple, dict, set, frozenset)
METHODS_OF_DATA = {name for kind in PLAIN for name in dir(kind) if not name.startswith("_")}
MUTABLE = (list, dict, set, bytearray)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
HOLE = "__hole_"


class Unsupported(Exception):
    pass


class Unsplit(Exception):
    """The program's calls cannot be taken out of an assertion before it runs."""


class Stop(BaseException):
    """Ends a run of a test. What the run came to is noted elsewhere, because a test may catch everything."""


def known_names(setup):
    namespace = {}
    exec(compile(setup, "setup", "exec"), namespace)
    return set(namespace) | set(dir(builtins)), namespace


def links(node):
    """The links of a chain of calls, attributes and subscripts from the outermost one on, and what it begins with."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        yield node
        node = node.func if isinstance(node, ast.Call) else node.value
    yield node


def root(node):
    *_, first = links(node)
    return first.id if isinstance(first, ast.Name) else None


def is_class(name):
    """Whether a test takes this name for that of a class, whose objects stay with the program."""
    return name[:1].isupper()


def callee(node):
    """Last name of what a call calls."""
    return getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""


def is_method_of_data(link):
    """Whether a link of a chain is a method that plain data has, on what a function returned. The program must not answer it: with an
    object whose `startswith` is always true it would pass without an answer."""
    if not isinstance(link, ast.Attribute) or link.attr not in METHODS_OF_DATA:
        return False
    base = link.value
    while isinstance(base, ast.Subscript):
        base = base.value
    return isinstance(base, ast.Call) and not is_class(callee(base))


def is_program(node, known, is_local):
    name = root(node)
    if name is None or name in known or is_local(name):
        return False
    return not any(map(is_method_of_data, links(node)))


def implied(tree, known):
    """Modules whose attributes a test uses, and that it does not import."""
    names = collections.Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    bases = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    bases = collections.Counter(base.id for base in bases)
    return [name for name in MODULES if bases[name] and bases[name] == names[name] and name not in known]
