class Cut(ast.NodeTransformer):
    """Takes the program's expressions out of an assertion, in order."""

    def __init__(self, known, modules):
        # Names of the assertion that the program does not have.
        self.known, self.taken, self.bound = known, [], [modules]

    def take(self, node):
        used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        called = node
        while isinstance(called, ast.Subscript):
            called = called.value
        if any(used & names for names in self.bound) or not isinstance(called, ast.Call):
            raise Unsplit
        self.taken.append(ast.unparse(node))
        return ast.copy_location(ast.Name(id=f"__value_{len(self.taken) - 1}", ctx=ast.Load()), node)

    def is_own(self, node):
        return is_program(node, self.known, lambda name: any(name in names for names in self.bound))

    def visit_Call(self, node):
        return self.take(node) if self.is_own(node) else self.generic_visit(node)

    visit_Attribute = visit_Subscript = visit_Call

    def visit_Name(self, node):
        return self.take(node) if isinstance(node.ctx, ast.Load) and self.is_own(node) else node

    def visit_NamedExpr(self, node):
        raise Unsplit

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


def cut(text, known, modules):
    body = ast.parse(text).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise Unsplit
    cutting = Cut(known, modules)
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
    try:
        text = repr(value)
    except ValueError:
        # The interpreter refuses to write an integer of thousands of digits.
        text = f"a value of the class {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "…"


def judged(text, values, known, modules, namespace):
    test, taken = cut(text, known, set(modules))
    if len(taken) != len(values):
        raise ValueError("there are as many values as calls")
    try:
        scope = {**namespace, **modules}
        scope.update({f"__value_{number}": decoded(value) for number, value in enumerate(values)})
        code = compile(test, "assertion", "eval")
        said = {"passed": bool(eval(code, scope)), "got": ", ".join(shown(scope[f"__value_{n}"]) for n in range(len(values)))}
        body = test.body
        if isinstance(body, ast.Compare) and len(body.ops) == 1 and isinstance(body.ops[0], ast.Eq):
            said["expected"] = shown(eval(compile(ast.Expression(body.comparators[0]), "expected", "eval"), scope))
        return said
    except Exception as error:
        return {"passed": False, "got": f"{type(error).__name__}: {str(error)[:200]}"}
