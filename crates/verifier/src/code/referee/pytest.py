def stand_in():
    """A module in the place of pytest."""
    module = types.ModuleType("pytest")
    module.raises, module.approx = Raises, Approximate
    return sys.modules.setdefault("pytest", module)


class Raises:
    """`pytest.raises`, where there is no pytest."""

    run = None

    def __new__(cls, kind, *arguments, match=None, **keywords):
        raises = super().__new__(cls)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raises.kinds = tuple(cls.run.class_of(kind) for kind in kinds)
        raises.match, raises.value = match, None
        if arguments:
            with raises:
                arguments[0](*arguments[1:], **keywords)
        return raises

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is None:
            self.run.failed("it did not raise")
            return False
        if not issubclass(kind, self.kinds):
            return False
        self.value = error
        if self.match is not None and not re.search(self.match, str(error)):
            self.run.failed(f"it raised {str(error)[:200]!r}")
        return True


class Approximate:
    """`pytest.approx`, where there is no pytest."""

    def __init__(self, expected, rel=1e-6, abs=1e-12):
        self.expected, self.rel, self.abs = expected, rel, abs

    def __repr__(self):
        return f"{self.expected!r} ± {self.rel:g}"

    def __eq__(self, got):
        expected = self.expected
        if isinstance(expected, dict):
            return isinstance(got, dict) and expected.keys() == got.keys() and all(self.near(got[key], expected[key]) for key in expected)
        if isinstance(expected, (list, tuple)):
            return type(got) is type(expected) and len(got) == len(expected) and all(map(self.near, got, expected))
        return self.near(got, expected)

    def near(self, got, expected):
        if isinstance(got, bool) or not isinstance(got, (int, float, complex)) or not isinstance(expected, (int, float, complex)):
            return got == expected
        return got == expected or abs(got - expected) <= max(self.rel * abs(expected), self.abs)
