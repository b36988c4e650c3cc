"""Decides assertions about a program in a process that the program never ran in.

`split` says which expressions of an assertion have to be evaluated by the program: its outermost calls. `judge` puts the values that the
program claims in their place, and evaluates what is left. Reads one JSON text on standard input, and writes one.
"""

import ast, builtins, json, sys


class Unsupported(Exception):
    pass


def known_names(setup):
    namespace = {}
    exec(compile(setup, "setup", "exec"), namespace)
    return set(namespace) | set(dir(builtins)), namespace


def root(node):
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


class Cut(ast.NodeTransformer):
    """Takes the program's expressions out of an assertion, in order."""

    def __init__(self, known):
        self.known, self.taken, self.bound = known, [], []

    def take(self, node):
        used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        if any(used & names for names in self.bound):
            raise Unsupported("it calls the program within a comprehension or a lambda")
        self.taken.append(ast.unparse(node))
        return ast.copy_location(ast.Name(id=f"__value_{len(self.taken) - 1}", ctx=ast.Load()), node)

    def is_own(self, node):
        name = root(node)
        return name is not None and name not in self.known and not any(name in names for names in self.bound)

    def visit_Call(self, node):
        return self.take(node) if self.is_own(node) else self.generic_visit(node)

    visit_Attribute = visit_Subscript = visit_Call

    def visit_Name(self, node):
        return self.take(node) if isinstance(node.ctx, ast.Load) and self.is_own(node) else node

    def within(self, node, names):
        self.bound.append(names)
        node = self.generic_visit(node)
        self.bound.pop()
        return node

    def visit_Lambda(self, node):
        return self.within(node, {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)})

    def comprehension(self, node):
        targets = [target for part in node.generators for target in ast.walk(part.target)]
        return self.within(node, {target.id for target in targets if isinstance(target, ast.Name)})

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension


def cut(text, known):
    body = ast.parse(text).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise Unsupported("it is not one assertion")
    cutting = Cut(known)
    test = cutting.visit(body[0].test)
    if not cutting.taken:
        raise Unsupported("it does not call the program")
    return ast.fix_missing_locations(ast.Expression(test)), cutting.taken


def decoded(value):
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "int":
        return int(inner, 16)
    if kind == "float":
        return float.fromhex(inner)
    if kind == "complex":
        return complex(*map(float.fromhex, inner))
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "dict":
        return {decoded(key): decoded(item) for key, item in inner}
    if kind in ("tuple", "set", "frozenset"):
        return getattr(builtins, kind)(decoded(item) for item in inner)
    raise Unsupported(f"an object of the class {str(inner)[:40]!r}, which no assertion can be about")


def shown(value):
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def judged(text, values, known, namespace):
    test, taken = cut(text, known)
    if len(taken) != len(values):
        raise ValueError("there are as many values as calls")
    try:
        scope = dict(namespace)
        scope.update({f"__value_{number}": decoded(value) for number, value in enumerate(values)})
        code = compile(test, "assertion", "eval")
        said = {"passed": bool(eval(code, scope)), "got": ", ".join(shown(scope[f"__value_{n}"]) for n in range(len(values)))}
        body = test.body
        if isinstance(body, ast.Compare) and len(body.ops) == 1 and isinstance(body.ops[0], ast.Eq):
            said["expected"] = shown(eval(compile(ast.Expression(body.comparators[0]), "expected", "eval"), scope))
        return said
    except Exception as error:
        return {"passed": False, "got": f"{type(error).__name__}: {str(error)[:200]}"}


def main():
    sys.setrecursionlimit(5000)
    order = json.load(sys.stdin)
    known, namespace = known_names(order["setup"])
    answers = []
    for entry in order["assertions"]:
        try:
            if "values" in entry:
                answers.append(judged(entry["text"], entry["values"], known, namespace))
            else:
                answers.append({"calls": cut(entry["text"], known)[1]})
        except (Unsupported, SyntaxError) as error:
            answers.append({"unsupported": str(error)})
    json.dump(answers, sys.stdout)


main()
