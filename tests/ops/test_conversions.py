"""16-bit floats on the CPU: all there are, widened, and what lies between them, rounded."""

import ctypes

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from cubn.backends.cpu import conversions
from cubn.backends.cpu.target import converts_halves, target
from tests import oracle

LANES = 16
ALL = np.arange(1 << 16, dtype=np.uint16)


def applied(convert, values, to, cpu):
    """convert(builder, 16 values) over a whole array, compiled for a processor."""
    module = ir.Module()
    kinds = {np.uint16: ir.IntType(16), np.float32: ir.FloatType()}
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.PointerType()] * 2), "convert")
    b = ir.IRBuilder(function.append_basic_block())
    given = b.load(function.args[0], typ=ir.VectorType(kinds[values.dtype.type], LANES))
    given.align = 1
    b.store(convert(b, given), function.args[1], align=1)
    b.ret_void()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu[0], features=cpu[1], jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    call = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_size_t)(engine.get_function_address("convert"))
    given = np.resize(values, -(-values.size // LANES) * LANES)
    found = np.empty(given.size, to)
    for i in range(0, given.size, LANES):
        call(given[i:].ctypes.data, found[i:].ctypes.data)
    return found[: values.size]


@pytest.fixture(params=["x86-64", "nehalem", "this one", "this one by instructions"])
def processor(request, monkeypatch):
    """Name and features of a processor that converts by hand, but for the last."""
    by_instructions = "instructions" in request.param
    if by_instructions and not converts_halves():
        pytest.skip("it has no such instructions")
    if "this one" not in request.param and not llvm.get_default_triple().startswith("x86_64"):
        pytest.skip("of another architecture")
    monkeypatch.setattr(conversions, "converts_halves", lambda: by_instructions)
    return target() if "this one" in request.param else (request.param, "")


def edges(widen):
    """float32 next to and between 16-bit floats, beyond them, and others at random."""
    numbers = widen(ALL)
    numbers = np.unique(numbers[np.isfinite(numbers)]).astype(np.float64)
    between = (numbers[1:] + numbers[:-1]) / 2  # ties
    with np.errstate(over="ignore"):
        centres = np.concatenate([numbers, between, numbers * 2, [0.0, -0.0]]).astype(np.float32)
    near = [np.nextafter(centres, np.float32(to)) for to in (-np.inf, np.inf)]
    at_random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 17, dtype=np.uint32).view(np.float32)
    powers = np.uint32(1) << np.arange(32, dtype=np.uint32)
    special = np.concatenate([powers, powers - 1, 0x7F800000 + powers[:23], 0xFF800000 + powers[:23]])
    return np.concatenate([centres, *near, at_random, special.astype(np.uint32).view(np.float32)])


def test_every_half_is_widened_exactly(processor):
    found = applied(conversions.widened_half, ALL, np.float32, processor)
    expected = ALL.view(np.float16).astype(np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), ALL >= 0x8000)
    nan = np.isnan(expected)
    assert (found.view(np.uint32)[nan] >> 22 & 1 == 1).all(), "a signalling NaN"


def test_every_float_is_rounded_to_the_nearest_half(processor):
    values = edges(lambda bits: bits.view(np.float16).astype(np.float32))
    found = applied(conversions.narrowed_half, values, np.uint16, processor)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    nan = np.isnan(values)
    assert np.array_equal(found[~nan], expected[~nan])
    assert np.isnan(found[nan].view(np.float16)).all()
    assert np.array_equal(found[nan] >> 15, values[nan].view(np.uint32) >> 31)


@pytest.mark.skipif(not converts_halves(), reason="nothing to compare with")
def test_both_ways_give_the_same_bits_of_nans_too():
    values = edges(lambda bits: bits.view(np.float16).astype(np.float32))
    for ours, theirs, given, to in (
        (conversions._widened_by_hand, conversions.widened_half, ALL, np.float32),
        (conversions._narrowed_by_hand, conversions.narrowed_half, values, np.uint16),
    ):
        by_hand, by_instructions = (applied(convert, given, to, target()) for convert in (ours, theirs))
        assert np.array_equal(by_hand.view(f"u{by_hand.itemsize}"), by_instructions.view(f"u{by_hand.itemsize}"))


def test_every_bfloat_is_widened_and_every_float_rounded_to_the_nearest_one(processor):
    found = applied(conversions.widened_bfloat, ALL, np.float32, processor)
    assert np.array_equal(found.view(np.uint32), ALL.astype(np.uint32) << 16)
    values = edges(oracle.widen)
    found = applied(conversions.narrowed_bfloat, values, np.uint16, processor)
    assert np.array_equal(oracle.widen(found), oracle.widen(oracle.narrow(values, np.uint16)), equal_nan=True)
