def stored(nodes):
    """Names that statements or targets bind in their own scope."""
    names, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, COMPREHENSIONS):
            names.update(inner.target.id for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr))
        elif not isinstance(node, ast.Lambda):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                names.add(node.id)
            elif isinstance(node, ast.alias):
                names.add(node.asname or node.name.split(".")[0])
            elif isinstance(node, (ast.Global, ast.Nonlocal)):
                names.update(node.names)
            elif type(node).__name__ in ("ExceptHandler", "MatchAs", "MatchStar") and node.name:
                names.add(node.name)
            elif type(node).__name__ == "MatchMapping" and node.rest:
                names.add(node.rest)
            waiting.extend(ast.iter_child_nodes(node))
    return names


class Scoped(ast.NodeTransformer):
    """Walks a tree with the names that the scopes around a node bind, from the outermost one."""

    def __init__(self, *scopes):
        self.scopes = list(scopes)

    def is_local(self, name):
        return any(name in names for names in self.scopes)

    def visit_all(self, nodes):
        found = [self.visit(node) for node in nodes]
        return [node for one in found for node in (one if isinstance(one, list) else [one])]

    @contextlib.contextmanager
    def scope(self, names):
        self.scopes.append(names)
        yield
        self.scopes.pop()

    def visit_Lambda(self, node):
        return self.function(node, [node.body])

    def visit_FunctionDef(self, node):
        node.decorator_list, node.returns = self.visit_all(node.decorator_list), None
        return self.function(node, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def function(self, node, body):
        arguments = node.args
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        arguments.defaults = self.visit_all(arguments.defaults)
        arguments.kw_defaults = [default and self.visit(default) for default in arguments.kw_defaults]
        named = {argument.arg for argument in ast.walk(arguments) if isinstance(argument, ast.arg)}
        with self.scope(named | stored(body)):
            node.body = self.visit(node.body) if isinstance(node, ast.Lambda) else self.visit_all(body)
        return node

    def visit_ClassDef(self, node):
        for field in ("decorator_list", "bases", "keywords"):
            setattr(node, field, self.visit_all(getattr(node, field)))
        with self.scope(stored(node.body)):
            node.body = self.visit_all(node.body)
        return node

    def comprehension(self, node):
        # The first iterable belongs to the scope around the comprehension.
        node.generators[0].iter = self.visit(node.generators[0].iter)
        with self.scope(stored(part.target for part in node.generators)):
            for number, part in enumerate(node.generators):
                part.iter = self.visit(part.iter) if number else part.iter
                part.target, part.ifs = self.visit(part.target), self.visit_all(part.ifs)
            for field in ("elt", "key", "value"):
                if hasattr(node, field):
                    setattr(node, field, self.visit(getattr(node, field)))
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension


class Free(Scoped):
    """Collects the names that an expression takes from the scopes around it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def visit_Name(self, node):
        if not self.is_local(node.id):
            self.names.add(node.id)
        return node


def free_names(node):
    free = Free()
    free.visit(copy.deepcopy(node))
    return free.names


def is_function(node):
    """Whether an argument is a function of the test, which leaves as text; anything else leaves as a value."""
    if isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.IfExp, ast.Starred)):
        return any(map(is_function, ast.iter_child_nodes(node)))
    return isinstance(node, ast.Lambda)


class Holes(Scoped):
    """Takes what only this process can evaluate out of an expression of the program's: the arguments that depend on the test's own
    names. They are evaluated here as a whole, so that of a case with what is expected only the named part leaves."""

    def __init__(self, known, outer):
        super().__init__()
        self.known, self.outer, self.expressions = known, outer, []

    def visit(self, node):
        if not isinstance(node, ast.expr):
            return super().visit(node)
        free = free_names(node)
        own = {name for name in free if any(name in names for names in self.outer) and not self.is_local(name)}
        inner = {name for name in free if self.is_local(name)}
        if not own:
            return node
        is_part = isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)) and root(node) in own
        calls_program = bool(free - own - inner - self.known) and not is_part
        if not (isinstance(node, (ast.Starred, ast.Slice)) or inner or calls_program or is_function(node)):
            self.expressions.append(node)
            return ast.copy_location(ast.Name(id=f"{HOLE}{len(self.expressions) - 1}_", ctx=ast.Load()), node)
        if is_part or isinstance(node, ast.JoinedStr):
            raise Unsupported(f"`{ast.unparse(node)}` is to be evaluated by the program and needs values of the test")
        return super().visit(node)


class Request:
    """An expression of the program's, with holes for values of the test."""

    def __init__(self, node):
        self.parts = re.split(HOLE + r"\d+_", ast.unparse(node))
        self.order = [int(number) for number in re.findall(HOLE + r"(\d+)_", ast.unparse(node))]
        # What is looked up and not called is the same each time.
        self.is_constant = not self.order and not isinstance(node, ast.Call)

    def filled(self, values):
        return self.parts[0] + "".join(values[number] + part for number, part in zip(self.order, self.parts[1:]))


def call(name, *arguments, keywords=()):
    return ast.Call(func=ast.Name(id=name, ctx=ast.Load()), args=list(arguments), keywords=list(keywords))


class Replay(Scoped):
    """Makes requests of the program's expressions in a test, and lets a run see its assertions."""

    def __init__(self, known, requests, exceptions, names):
        super().__init__(names)
        self.known, self.requests, self.exceptions = known, requests, exceptions
        self.is_handler, self.is_guarded = False, False

    def visit_Call(self, node):
        return self.request(node) if is_program(node, self.known, self.is_local) else self.generic_visit(node)

    visit_Attribute = visit_Subscript = visit_Name = visit_Call

    def request(self, node):
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            raise Unsupported(f"it assigns to `{ast.unparse(node)}` of the program")
        if any(isinstance(inner, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)) for inner in ast.walk(node)):
            raise Unsupported("it assigns, awaits or yields within a call of the program")
        if self.is_handler:
            if not isinstance(node, ast.Name):
                raise Unsupported(f"it catches `{ast.unparse(node)}` of the program")
            self.exceptions.add(node.id)
            return ast.copy_location(call("__exception__", ast.Constant(node.id)), node)
        holes = Holes(self.known, self.scopes)
        self.requests.append(Request(holes.generic_visit(copy.deepcopy(node))))
        number = ast.Constant(len(self.requests) - 1)
        return ast.copy_location(call("__program__", number, *self.visit_all(holes.expressions)), node)

    def visit_ClassDef(self, node):
        if any(is_program(base, self.known, self.is_local) for base in node.bases):
            raise Unsupported("it derives a class from one of the program")
        return super().visit_ClassDef(node)

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_ExceptHandler(self, node):
        if node.type is not None:
            self.is_handler = True
            node.type = self.visit(node.type)
            self.is_handler = False
        node.body = self.visit_all(node.body)
        return node

    def visit_Try(self, node):
        with self.guarded():
            node.body = self.visit_all(node.body)
        for field in ("handlers", "orelse", "finalbody"):
            setattr(node, field, self.visit_all(getattr(node, field)))
        return node

    visit_TryStar = visit_Try

    def visit_With(self, node):
        node.items = self.visit_all(node.items)
        with self.guarded():
            node.body = self.visit_all(node.body)
        return node

    @contextlib.contextmanager
    def guarded(self):
        before, self.is_guarded = self.is_guarded, True
        yield
        self.is_guarded = before

    def visit_Expr(self, node):
        node = self.generic_visit(node)
        # In a `try` or `with` such a call is there for what it raises.
        if isinstance(node.value, ast.Call) and not self.is_guarded:
            called = call("__effect__", node.value.func, *node.value.args, keywords=node.value.keywords)
            node.value = ast.copy_location(called, node.value)
        return node

    def visit_Assert(self, node):
        node = self.generic_visit(node)
        test, told = node.test, [node.msg or ast.Constant(None)]
        lines = []
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            for name, side in (("__left__", test.left), ("__right__", test.comparators[0])):
                lines.append(ast.Assign(targets=[ast.Name(id=name, ctx=ast.Store())], value=side))
            left, right = (ast.Name(id=name, ctx=ast.Load()) for name in ("__left__", "__right__"))
            test = ast.Compare(left=left, ops=test.ops, comparators=[right])
            told += [left, right]
        failing = ast.Expr(call("__failed__", *told))
        lines.append(ast.If(test=ast.UnaryOp(op=ast.Not(), operand=test), body=[failing], orelse=[]))
        return [ast.copy_location(line, node) for line in lines]
