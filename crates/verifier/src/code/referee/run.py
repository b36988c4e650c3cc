def literal(value, depth=0):
    """A value as text that the program's interpreter reads as an equal one."""
    if depth > MOST_DEPTH:
        raise Unsupported(f"it sends values within values, deeper than {MOST_DEPTH}")
    kind = type(value)

    def items(values):
        return ", ".join(literal(item, depth + 1) for item in values)

    if isinstance(value, Unknown):
        raise Depends
    if kind is Function:
        return value._text
    if value is None or kind in (bool, str, bytes):
        return repr(value)
    if kind is int:
        # The decimal text of a long integer takes long, and may be refused.
        return repr(value) if abs(value) < 1 << 1000 else hex(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else "(1e999 - 1e999)" if value != value else "1e999" if value > 0 else "-1e999"
    if kind is complex and repr(eval(repr(value))) == repr(value):
        return repr(value)
    if kind is list:
        return f"[{items(value)}]"
    if kind is tuple:
        return f"({items(value)},)" if value else "()"
    if kind is dict:
        return "{" + ", ".join(f"{literal(key, depth + 1)}: {literal(item, depth + 1)}" for key, item in value.items()) + "}"
    if kind is set:
        return "{" + items(value) + "}" if value else "{*()}"
    # The program may have given these names to something else.
    if kind in (frozenset, bytearray):
        return f"__builtins__.{kind.__name__}({literal((list if kind is frozenset else bytes)(value), depth + 1)})"
    if kind is range:
        return f"__builtins__.range({value.start}, {value.stop}, {value.step})"
    if kind in (types.GeneratorType, map, filter, zip, enumerate, reversed):
        return f"__builtins__.iter([{items(value)}])"
    name = getattr(value, "__name__", None)
    if isinstance(name, str) and getattr(builtins, name, None) is value:
        return name
    raise Unsupported(f"it sends an object of the class `{kind.__name__}` to the program, and only plain data can be sent")


class Depends(Exception):
    """A call whose arguments are not known yet."""


class Function:
    """An object of the program's, by the text that evaluates to it there. It can be called, and nothing else."""

    def __init__(self, run, text, kind):
        self._run, self._text, self._kind = run, text, kind

    def __call__(self, *arguments, **keywords):
        return self._run.called(self._text, arguments, keywords)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self._refused()

    def _refused(self, *_):
        raise Unsupported(f"an object of the class {self._kind[:40]!r}, which no assertion can be about")


class Unknown:
    """Stands for what the program will return. Comparisons hold, so that a run goes the way of a program that passes."""

    def __init__(self, run, text=None):
        self._run, self._text = run, text

    def __call__(self, *arguments, **keywords):
        return Unknown(self._run) if self._text is None else self._run.called(self._text, arguments, keywords)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in METHODS_OF_DATA or is_class(callee(ast.parse(self._text or "None", mode="eval").body)):
            self._run.refuse(f"it uses `.{name}` of an object of the program, and only plain data comes back")
        return Unknown(self._run)

    def _more(self, *_):
        return Unknown(self._run)

    __bool__ = __contains__ = lambda self, *_: True
    __len__ = __int__ = __index__ = lambda self: 1
    __float__ = lambda self: 1.0
    __complex__ = lambda self: 1j
    __hash__ = lambda self: id(self)
    __str__ = __repr__ = __format__ = lambda self, *_: "?"
    __iter__ = lambda self: iter(())


COMPARED = "eq ne lt le gt ge".split()
CALCULATED = "add sub mul truediv floordiv mod pow divmod matmul and or xor lshift rshift".split()
for operator in COMPARED + CALCULATED + [f"r{name}" for name in CALCULATED] + "getitem neg pos abs invert round trunc floor ceil".split():
    setattr(Unknown, f"__{operator}__", Unknown._more)
    setattr(Function, f"__{operator}__", Function._refused)
for operator in "len iter contains int float index str format".split():
    setattr(Function, f"__{operator}__", Function._refused)
Function.__hash__ = object.__hash__


class Run:
    """One run of a test."""

    def __init__(self, requests, exceptions, answers, room):
        self.requests, self.room = requests, room
        self.is_first = not answers
        self.known = collections.defaultdict(list)
        for number, answer in enumerate(answers):
            self.known[answer["call"]].append((number, answer))
        self.turns, self.constants = collections.Counter(), {}
        self.exceptions = {name: type(name, (Exception,), {}) for name in exceptions}
        self.scope, self.raised, self.got = {}, [], []
        self.pending, self.bytes, self.used = [], 0, 0
        self.refused = self.ended = self.wrong = self.sides = None

    # What the code of a test calls.

    def program(self, number, *values):
        request = self.requests[number]
        if request.is_constant and number in self.constants:
            return self.constants[number]
        try:
            text = request.filled([literal(value) for value in values])
        except Depends:
            return Unknown(self)
        except Unsupported as error:
            self.refuse(str(error))
        value = self.asked(text)
        if request.is_constant:
            self.constants[number] = value
        return value

    def effect(self, function, *arguments, **keywords):
        if isinstance(function, (Function, Unknown)) or getattr(function, "__func__", None) is Run.program:
            if any(type(value) in MUTABLE for value in (*arguments, *keywords.values())):
                self.refuse("it calls the program for what that does to an argument, and the program has a copy")
        return function(*arguments, **keywords)

    def failed(self, message, *sides):
        if self.pending:
            return
        self.wrong = AssertionError(*[message] if message is not None else [])
        # The sides of `==`, which are of more use than the values of all calls.
        self.sides = dict(zip(("got", "expected"), map(shown, sides)))
        raise self.wrong

    def exception(self, name):
        return self.exceptions[name]

    def class_of(self, kind):
        """The class that `raises` was called with, which is the program's own where it is no class here."""
        if not isinstance(kind, (Function, Unknown)):
            return kind
        return self.exceptions.setdefault(str(kind._text), type("Own", (Exception,), {}))

    # While a run speculates, all items are looked at, so that the calls for all of them are found.

    def all(self, items):
        for item in items:
            if not item and not self.pending:
                return False
        return True

    def any(self, items):
        for item in items:
            if item and not self.pending:
                return True
        return bool(self.pending)

    # Requests.

    def called(self, text, arguments, keywords):
        try:
            parts = [literal(value) for value in arguments]
            parts += [f"{self.keyword(name)}={literal(value)}" for name, value in keywords.items()]
        except Depends:
            return Unknown(self)
        except Unsupported as error:
            self.refuse(str(error))
        return self.asked(f"{text}({', '.join(parts)})")

    def keyword(self, name):
        if not name.isidentifier() or keyword.iskeyword(name):
            raise Unsupported(f"it sends the keyword {name[:40]!r}")
        return name

    def asked(self, text):
        turn = self.turns[text]
        self.turns[text] += 1
        known = self.known.get(text, [])
        if sum(self.turns.values()) > MOST_CALLS:
            self.full(f"it makes more than {MOST_CALLS} calls")
        if turn < len(known):
            return self.answered(text, *known[turn])
        size = len(json.dumps(text))
        self.bytes += size
        self.room[0] -= size
        if self.bytes > MOST_BYTES or self.room[0] < 0:
            self.full(f"its calls have more than {MOST_BYTES if self.bytes > MOST_BYTES else MOST_BYTES_TOGETHER} bytes")
        self.pending.append(text)
        if len(self.pending) == 1:
            signal.setitimer(signal.ITIMER_VIRTUAL, SPECULATION_SECONDS, SPECULATION_SECONDS / 10)
        return Unknown(self, text)

    def answered(self, text, number, answer):
        self.used += 1
        if "value" in answer:
            value = answer["value"]
            if isinstance(value, dict) and "other" in value:
                return Function(self, text, str(value["other"]))
            value = decoded(value)
            self.got.append(shown(value))
            return value
        if "raised" in answer:
            error = rebuilt(answer["raised"], [self.exceptions, self.scope, vars(builtins)])
            # Within `map` these would end the items before the first one, and `all` would hold.
            if not isinstance(error, (StopIteration, StopAsyncIteration, GeneratorExit)):
                self.raised.append((error, number))
                raise error
        self.ended = number
        raise Stop

    def full(self, problem):
        # The calls that a later run found by speculation depend on guesses; the ones before the bound may be all.
        if self.pending and not self.is_first:
            raise Stop
        self.refuse(problem)

    def refuse(self, problem):
        if not self.pending or self.is_first:
            self.refused = problem
        raise Stop

    def late(self, *_):
        if self.pending:
            raise Stop

    # The run.

    def execute(self, *codes):
        """Runs the code of the setup and of the test, and says what came of it."""
        self.scope.update(__program__=self.program, __effect__=self.effect, __failed__=self.failed, __exception__=self.exception)
        self.scope.update(all=self.all, any=self.any)
        Raises.run = self
        signal.signal(signal.SIGVTALRM, self.late)
        random.seed(0)
        error = None
        try:
            try:
                for code in codes:
                    exec(code, self.scope)
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except BaseException as raised:
            error = raised
        return self.result(error)

    def result(self, error):
        if self.refused is not None:
            return {"unsupported": self.refused}
        if self.pending:
            return {"pending": self.pending}
        if self.ended is not None:
            return {"ended": self.ended}
        if not self.used:
            raise Unsupported("it does not call the program" + (f": {describe(error)}" if error is not None else ""))
        got = ", ".join(self.got[:4])
        if error is None:
            return {"passed": True, "got": got}
        for raised, number in self.raised:
            if raised is error:
                return {"ended": number}
        if error is not self.wrong:
            return {"passed": False, "got": describe(error)}
        return {"passed": False, "got": got, **self.sides}


def describe(error):
    return str(error)[:200] if isinstance(error, Unsupported) else f"{type(error).__name__}: {str(error)[:200]}"


def rebuilt(told, namespaces):
    """The exception that the program says it raised, of the classes that this process has under the same names."""
    try:
        names, text = [str(name) for name in told["classes"]], str(told["text"])
        found = [next((space[name] for space in namespaces if name in space), None) for name in names]
        bases = []
        for known in found:
            if isinstance(known, type) and issubclass(known, BaseException) and not any(issubclass(base, known) for base in bases):
                bases.append(known)
        bases = bases or [Exception]
        try:
            arguments = [decoded(value) for value in told["arguments"]]
        except Exception:
            arguments = [text]
        if found[0] in bases and len(bases) == 1:
            with contextlib.suppress(Exception):
                return bases[0](*arguments)
        kind = type(names[0], tuple(bases), {"__init__": lambda self, *_: None, "__str__": lambda self: text})
        return kind(*arguments)
    except Exception:
        return Exception("an exception that cannot be read")
