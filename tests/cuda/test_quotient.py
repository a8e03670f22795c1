"""`quotient` of arithmetic.cuh, which divides by a tile's rows: the bits of a division, but for a zero's sign.

Whatever the binade of a normal quotient, the same happens: one binade of dividends, and its neighbour, stand for all.
"""

import subprocess

import pytest

from cubn.backends.cuda.source import folder
from tests.cuda_on_cpu.build import unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

COUNTS = (1, 2, 3, 4, 5, 7, 8)

PROGRAM = """
#include <cstdio>
#include <random>

template <class Acc, class Bits> struct Check {
    long long different = 0;
    void operator()(Acc a, int count) {
        const Acc found = quotient(a, Acc(count), Acc(1) / Acc(count)), expected = a / Acc(count);
        different += found != expected && !(found != found && expected != expected);
    }
    void both(Bits bits, int count) {
        (*this)(same_bits<Acc>(bits), count);
        (*this)(-same_bits<Acc>(bits), count);
    }
    void all(Acc first, Acc last, int count) {
        for (Bits bits = same_bits<Bits>(first); bits <= same_bits<Bits>(last); ++bits) both(bits, count);
    }
};

long long floats(int count) {
    Check<float, unsigned> check;
    check.all(0, 0x1p-121f, count);         // subnormal quotients, and more
    check.all(1, 4, count);
    check.all(0x1p127f, -LEAST<float>, count);
    check.both(0x7f800000, count);          // infinities
    check.both(0x7fc00000, count);
    return check.different;
}

long long doubles(int count) {
    Check<double, unsigned long long> check;
    std::mt19937_64 random(count);
    const auto near = [&](double a) {
        for (int i = -2; i <= 2; ++i) check.both(same_bits<unsigned long long>(a) + i, count);
    };
    for (int i = 0; i < 1000000; ++i) {
        const double any = same_bits<double>(0x3ff0000000000000 | random() >> 12); // from 1 to 2
        near(any);
        near(any * count + 0x1p-53 * count); // half way between two quotients
        near(same_bits<double>(random() >> 11 >> random() % 53) * count / 2); // among subnormals
    }
    for (unsigned long long i = 0; i < 1000000; ++i) check.both(i, count);
    near(0x1p-1022 * count);
    check.both(same_bits<unsigned long long>(-LEAST<double>), count);
    check.both(0x7ff0000000000000, count);
    check.both(0x7ff8000000000000, count);
    return check.different;
}

int main(int, char** arguments) {
    for (int count = 1; count <= 8; ++count)
        std::printf("%lld ", *arguments[1] == 'f' ? floats(count) : doubles(count));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    target = tmp_path_factory.mktemp("quotient") / "quotient"
    source = (folder() / "arithmetic.cuh").read_text(encoding="utf-8").replace("#pragma once", "") + PROGRAM
    command = ["g++", "-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-x", "c++", "-", "-o", str(target)]
    subprocess.run(command, input=source, text=True, check=True)
    return target


@pytest.mark.parametrize("acc", ["float", "double"])
def test_a_quotient_has_the_bits_of_a_division(program, acc):
    done = subprocess.run([program, acc], capture_output=True, text=True, check=True)
    different = dict(enumerate(map(int, done.stdout.split()), 1))
    assert [count for count in COUNTS if different[count]] == []
    assert different[6]  # why a column of 6 values is divided
