"""The language of kernels: what a function in it gives, compiled, is what Python gives."""

import array
import builtins
import itertools

import pytest

from cubn.backends.cpu import compile, language
from cubn.backends.cpu.simd import I64, get, instruction, moved, put

INTEGERS = (-(2**40), -17, -16, -3, -1, 0, 1, 2, 7, 16, 17, 2**40)


def native(python):
    """A function of two integers, compiled."""
    function = language.Function(python)

    def kernel(p, worker):
        put(p, function(get(p), get(p + 8)))

    text = language.llvm_ir({"kernel": kernel})
    call = compile._load(compile._optimised(text)).call

    def run(x, y):
        memory = array.array("q", (x, y))
        call(memory.buffer_info()[0], 0)
        return memory[0]

    return run


def collatz(n, limit):
    steps = 0
    while n > 1 and steps < limit:
        n = 3 * n + 1 if n % 2 else n // 2
        steps += 1
    return steps


def primes(first, stop):
    found = 0
    for n in range(max(first, 2), min(stop, 60)):
        for d in range(2, n):
            if n % d == 0:
                break
        prime = True
        for d in range(n - 1, 1, -1):
            if n % d:
                continue
            prime = False
        if prime:
            found = 100 * found + n
        if found > 0x10000000000:
            return -found
    return found


def nested(x, y):
    (a, b), c = (x, y), 5
    a, b = b, a
    pair = (a, (b, c))
    if x > y:
        pair = pair[0] + 1, (pair[1][1], pair[1][0])
    return pair[0] * 1000 + pair[1][0] * 10 + pair[1][1] - (a if a < b else (b if x else c))


def logic(x, y):
    between = -16 <= x < y <= 16
    either = x == 7 or (y != 7 and not x) or y > 0x40000000
    return 4 * between + 2 * either + (not (x and y))


WIDTH, ON, OFF, TEXT = 16, True, False, "columns"


def constants(x, y):
    if TEXT == "rows" or OFF:
        return undefined + x  # noqa: F821
    total = 5 if ON or undefined else 6  # noqa: F821
    total += 7 if OFF and undefined else 8  # noqa: F821
    for i in range(0, WIDTH, 3):
        total += i * x if ON and i % 2 else -y
    return total + (WIDTH // 3) % 5 - (-WIDTH >> 1)


def bits(x, y):
    x = x & 0xFFFF | 1
    y &= 31
    return (x << y) + (-x >> y)


@pytest.mark.parametrize("operator", ["//", "%"])
@pytest.mark.parametrize("divisor", ["y", "16", "1", "7", "-5"])
def test_division_rounds_down(operator, divisor, tmp_path):
    python = written(tmp_path, f"def divided(x, y):\n    return x {operator} {divisor}\n", "divided")
    same(python, [(x, y) for x, y in itertools.product(INTEGERS, INTEGERS) if y])


@pytest.mark.parametrize("python", [nested, logic, constants, bits], ids=lambda f: f.__name__)
def test_arithmetic_computes_what_python_does(python):
    same(python, itertools.product(INTEGERS, INTEGERS))


@pytest.mark.parametrize("python", [collatz, primes], ids=lambda f: f.__name__)
def test_loops_compute_what_python_does(python):
    same(python, [(0, 0), (1, 5), (6, 100), (27, 1000), (27, 20), (2, 60), (59, 60)])


def same(python, arguments):
    compiled, arguments = native(python), list(arguments)
    assert [compiled(x, y) for x, y in arguments] == [int(python(x, y)) for x, y in arguments]


def written(folder, source, name):
    """A function from source that is in a file, where its compiler looks for it."""
    file = folder / "source.py"
    file.write_text(source)
    scope = {}
    exec(builtins.compile(source, str(file), "exec"), scope)
    return scope[name]


def test_a_function_is_compiled_once_for_each_shape_of_its_arguments():
    @language.Function
    def twice(at):
        return moved(at, at, 1)[0]

    def kernel(p, worker):
        put(p, twice((1, 2)) + twice((3, 4)) + twice((5, 6, 7)))

    text = language.llvm_ir({"kernel": kernel})
    assert text.count("define internal") == 2
    memory = array.array("q", (0,))
    compile._load(compile._optimised(text)).call(memory.buffer_info()[0], 0)
    assert memory[0] == 2 + 6 + 10


def test_a_truth_decides_before_what_follows_it_is_evaluated():
    """As the mask's byte behind the last position, which is not to be read."""

    @instruction(I64)
    def touched(counter):
        one = get.emit(counter) + 1
        put.emit(counter, one)
        return one

    def kernel(p, worker):
        if (get(p) and touched(p + 8)) or (get(p + 16) and not touched(p + 8)):
            put(p, 77)

    text = language.llvm_ir({"kernel": kernel})
    memory = array.array("q", (0, 0, 0))
    compile._load(compile._optimised(text)).call(memory.buffer_info()[0], 0)
    assert memory.tolist() == [0, 0, 0]
    memory[0] = 5
    compile._load(compile._optimised(text)).call(memory.buffer_info()[0], 0)
    assert memory.tolist() == [77, 1, 0]


@pytest.mark.parametrize(
    "statement",
    ["return x ** y", "x = [y]", "return x / y", "return abs(x)", "assert x", "for i in (1, 2): pass", "return z"],
)
def test_what_the_language_lacks_is_named_with_its_line(statement, tmp_path):
    python = written(tmp_path, f"def function(x, y):\n    {statement}\n", "function")
    with pytest.raises(language.NotInTheLanguage, match="a part of Python, without") as caught:
        native(python)
    assert (caught.value.filename, caught.value.lineno) == (str(tmp_path / "source.py"), 2)


def test_source_that_is_gone_is_not_guessed(tmp_path):
    python = written(tmp_path, "def function(x, y):\n    return x\n", "function")
    (tmp_path / "source.py").unlink()
    with pytest.raises(language.NoSource):
        native(python)


@pytest.mark.parametrize(
    "edited",
    [
        "def function(x, y):\n    return x + 2\n",
        "def function(x, y):\n    return x - 1\n",
        "def function(x, y):\n    return y + 1\n",
        "# a line more\ndef function(x, y):\n    return x + 1\n",
        "def function(x, z):\n    return x + 1\n",
        "def another(x, y):\n    return x + 1\n",
        "def function(x, y):\n    return other(x + 1)\n",
        "x = 1\n",
        "def function(\n",
        "\0",
        "",
    ],
)
def test_source_that_was_edited_since_it_was_loaded_is_not_compiled(edited, tmp_path):
    """An upgrade under a running process: what runs is what was loaded."""
    python = written(tmp_path, "def function(x, y):\n    return x + 1\n", "function")
    (tmp_path / "source.py").write_text(edited)
    with pytest.raises(language.NoSource):
        native(python)


def test_source_is_known_for_what_it_is_wherever_it_stands(tmp_path):
    """Within another function, behind decorators, with lines of text that are not indented as it is."""
    source = """
def around(n):
    @(lambda function: function)
    @(
        lambda function: function
    )
    def function(x, y):
        '''Text
    of several
            lines.'''
        return x + n * y
    return function
"""
    python = written(tmp_path, source, "around")(3)
    assert native(python)(10, 2) == 16
