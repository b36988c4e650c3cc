class Referee:
    """Decides the tests of one setup."""

    def __init__(self, setup, replay):
        self.setup, self.source = setup, replay
        self.known, self.namespace = known_names(setup)
        self.room = [MOST_BYTES_TOGETHER]
        tree = ast.parse(setup)
        self.modules = self.imported(tree)
        self.namespace.update(self.modules)
        self.requests, self.exceptions = [], set()
        self.code = compile(setup, "setup", "exec")
        loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        if loaded - self.known - set(self.modules):
            # Those of its names that nothing defines may be the program's, or local to its functions.
            try:
                self.code = self.replaying(tree, "setup", self.requests, self.exceptions, set(self.modules))
            except Unsupported:
                # It calls the program in a way that cannot be replayed. Tests that do not use that part are not refused for it.
                self.requests = []

    def load(self):
        """Compiles the part that replays tests: most assertions are split, and compiling it takes longer than deciding them."""
        if self.source:
            exec(compile(self.source, "replay", "exec"), globals())
            self.source = None

    def imported(self, tree):
        modules = {}
        for name in implied(tree, self.known):
            try:
                modules[name] = __import__(name)
            except ImportError:
                if name != "pytest":
                    raise
                self.load()
                modules[name] = stand_in()
        return modules

    def replaying(self, tree, name, requests, exceptions, names):
        self.load()
        tree.body = Replay(self.known, requests, exceptions, names).visit_all(tree.body)
        return compile(ast.fix_missing_locations(tree), name, "exec")

    def decide(self, entry):
        text = textwrap.dedent(entry["text"]).strip()
        tree = ast.parse(text)
        modules = {**self.modules, **self.imported(tree)}
        if "values" in entry:
            return judged(text, entry["values"], self.known, modules, self.namespace)
        if "answers" not in entry and not self.requests:
            with contextlib.suppress(Unsplit):
                return {"calls": cut(text, self.known, set(modules))[1]}
        if not any(isinstance(node, (ast.Assert, ast.Raise)) or getattr(node, "attr", "") == "raises" for node in ast.walk(tree)):
            raise Unsupported("it asserts nothing")
        self.load()
        if HOLE in text or HOLE in self.setup:
            raise Unsupported(f"it uses the name `{HOLE}`")
        requests, exceptions = list(self.requests), set(self.exceptions)
        code = self.replaying(tree, "test", requests, exceptions, set(modules) | stored(tree.body))
        run = Run(requests, exceptions, entry.get("answers", []), self.room)
        run.scope.update(modules)
        return run.execute(self.code, code)


def main():
    sys.setrecursionlimit(5000)
    order = json.load(sys.stdin)
    # What a test prints is no answer.
    answers_to, sys.stdout = sys.stdout, sys.stderr
    referee = Referee(order["setup"], order["replay"])
    answers = []
    for entry in order["assertions"]:
        try:
            answers.append(referee.decide(entry))
        except (Unsupported, SyntaxError) as error:
            answers.append({"unsupported": str(error)})
    # The interpreter writes out this one when it ends.
    sys.stdout = answers_to
    json.dump(answers, sys.stdout)


main()
