"""What NVIDIA's compiler makes of every specialisation, for every compute capability, without a driver.

By default every kernel is compiled, and something for every architecture; with -m full every kernel for each, another
specialisation for each, and for one architecture every value of every option; all of them with -m slow.
"""

import re

import pytest

from cubn.backends.cuda.source import folder, translation_unit
from tests.cuda import nvrtc
from tests.cuda.specialisations import Specialisation, specialisations

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # of a multiprocessor, of all of these architectures
INEXACT = re.compile(r"\S*\.ftz\S*|\S*\.approx\S*|\bdiv\.full\S*|\b(?:fma|mad)\.\S*f(?:16|32|64)\S*")
"""What flushes subnormals, approximates or contracts."""
QUOTIENT = re.compile(
    r"\{ /\* quotient \*/ \.reg \.(f32|f64) q, minus, rest; mul\.rn\.\1 q, \S+, \S+; neg\.\1 minus, q; "
    r"fma\.rn\.\1 rest, minus, \S+, \S+; max\.\1 rest, rest, \S+; fma\.rn\.\1 \S+, rest, \S+, q; \}"
)
"""The one function of arithmetic.cuh that fuses, and has the bits of a division: tests/cuda/test_quotient.py."""
WIDE_LOAD = re.compile(r"\bld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)\b|\bcp\.async\.cg\S* .*, 16\b")
WIDE_STORE = re.compile(r"\bst\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)\b")
EVERY_OPTION = 90  # the architecture for which every option's values are compiled

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float": 4, "double": 8}


def compiler(cuda):
    """The architectures of CUDA's compiler; skips where it is not installed."""
    try:
        return nvrtc.architectures(cuda)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def compiled(specialisation, architecture, cuda=13):
    source = translation_unit(specialisation.source)
    return nvrtc.compile(source, specialisation.options, architecture, cuda)[specialisation.kernel]


# --- what is asserted -------------------------------------------------------------------------------------------------


def check_exact(kernel):
    """Nothing in the PTX flushes subnormals, approximates or contracts."""
    assert not (found := set(INEXACT.findall(QUOTIENT.sub("", kernel.ptx)))), found


def check_registers(kernel):
    """Everything is in registers, and these are few enough for the blocks that the kernel says it is meant for."""
    assert kernel.stack_bytes == 0, f"{kernel.stack_bytes} bytes of local memory"
    assert kernel.spill_bytes == 0, f"{kernel.spill_bytes} bytes of spills"
    threads, blocks = blocks_meant(kernel.ptx)
    granted = -(-kernel.registers // 8) * 8  # to a thread
    assert granted * threads * blocks <= REGISTERS, f"{kernel.registers} registers, {blocks} blocks of {threads}"


SPILT = {
    "reduce_channels-ELEMENT_bfloat16-KIND_Sums-GATE_GATE_RECOMPUTE-TILE_ROWS_7-VECTOR_4-DEPTH_3-TILE_DEPTH_8-BLOCKS_2",
    "slab-ELEMENT_double-THREADS_256-CLUSTER_2-GROUPED_0-ALIGNED_0-TILE_LANES_32-TILE_ROWS_8-TALL_0"
    "-OPERATION_NORMALIZE-RESIDUAL_1-RELU_0-KEEP_BITS_0",
    "ticketed-ELEMENT_float16-THREADS_256-CLUSTER_1-GROUPED_0-TILE_LANES_32-TILE_ROWS_5-TALL_1"
    "-OPERATION_NORMALIZE-RESIDUAL_1-RELU_1-KEEP_BITS_1",
    "ticketed-ELEMENT_bfloat16-THREADS_256-CLUSTER_1-GROUPED_0-TILE_LANES_32-TILE_ROWS_5-TALL_1"
    "-OPERATION_NORMALIZE-RESIDUAL_1-RELU_0-KEEP_BITS_0",
}
"""Those whose threads keep 8 bytes in local memory on some devices: registers for them would cost all others more."""


def check_spilt(kernel):
    """No more than is known."""
    assert kernel.stack_bytes <= 8, f"{kernel.stack_bytes} bytes of local memory"


def blocks_meant(ptx):
    """(threads of a block, blocks of a multiprocessor) that __launch_bounds__ asks for."""
    threads = re.search(r"^\.maxntid (\d+)", ptx, re.MULTILINE)
    blocks = re.search(r"^\.minnctapersm (\d+)", ptx, re.MULTILINE)
    return int(threads[1]) if threads else 1024, int(blocks[1]) if blocks else 1


def check_vectors(specialisation, kernel):
    """Elements that are neighbours in memory are read and written 16 bytes at a time, where they begin so."""
    loads, stores = vectors_expected(specialisation)
    found = len(WIDE_LOAD.findall(kernel.ptx)), len(WIDE_STORE.findall(kernel.ptx))
    assert found[0] >= loads and found[1] >= stores, f"{found} loads and stores of 16 bytes, not {(loads, stores)}"


def vectors_expected(specialisation):
    """(loads, stores) of 16 bytes there must be at least."""
    values = specialisation.values
    if "ELEMENT" not in values:
        return 0, 0
    of_octet = 8 * ELEMENT_BYTES[values["ELEMENT"]] // 16
    match specialisation.kernel:
        case "reduce_rows":
            rows = max(int(values["TILE_ROWS"]), 8 * int(values["TALL"]))
            if values["KIND"] == "Moments":
                return rows * of_octet, 0
            return 2 * min(rows, 5) * of_octet, 0  # more than five: the first, and a loop of four
        case "apply_rows" | "apply_channels" if values["OPERATION"] == "COMBINE":
            return (2 + (values["THIRD"] != "NONE")) * of_octet, of_octet
        case "apply_rows" | "apply_channels":
            second = int(values["RESIDUAL"])
            if values["OPERATION"] == "NORMALIZE":
                return (1 + second) * of_octet, of_octet
            reads_x = values["FROZEN"] == "0" or values["GATE"] == "GATE_RECOMPUTE"
            return (1 + reads_x) * of_octet, (1 + second) * of_octet
        case "reduce_channels" | "apply_strided" | "reduce_strided":
            return 0, 0  # 8 bytes of channels of many positions; single elements
    return 1, of_octet


def check(specialisation, architecture, cuda=13):
    """All of it."""
    try:
        kernel = compiled(specialisation, architecture, cuda)
        check_exact(kernel)
        (check_spilt if str(specialisation) in SPILT else check_registers)(kernel)
        check_vectors(specialisation, kernel)
    except (AssertionError, nvrtc.CompileError) as error:
        raise AssertionError(f"{specialisation} for sm_{architecture}: {error}") from error


# --- the kernels ------------------------------------------------------------------------------------------------------


def of_kernel(architecture, name):
    return [s for s in specialisations() if s.kernel == name and s.fits(architecture)]


def every_value(found):
    """A few specialisations that have every value of every option."""
    missing = {value for s in found for value in s.options}
    while missing:
        best = max(found, key=lambda s: len(missing & set(s.options)))
        missing -= set(best.options)
        yield best


KERNELS = sorted(
    name
    for path in folder().glob("*.cu")
    for name in re.findall(r"__global__ void [^{;]*?(\w+)\(const __grid_constant__", path.read_text(encoding="utf-8"))
)


def test_every_kernel_is_launched():
    """What is compiled here comes from the backend; no kernel is left out."""
    assert sorted({s.kernel for s in specialisations()}) == KERNELS


@pytest.mark.every_value
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_specialisation_is_exact_in_registers_and_in_vectors(kernel, architecture):
    assert architecture in compiler(13)
    found = of_kernel(architecture, kernel)
    check(found[ARCHITECTURES.index(architecture) * len(found) // len(ARCHITECTURES)], architecture)


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_value_of_every_option_is_exact_in_registers_and_in_vectors(kernel):
    compiler(13)
    for specialisation in every_value(of_kernel(EVERY_OPTION, kernel)):
        check(specialisation, EVERY_OPTION)


@pytest.mark.slow
@pytest.mark.parametrize("cuda", nvrtc.PLACES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_specialisation_is_exact_in_registers_and_in_vectors(kernel, architecture, cuda):
    if architecture not in compiler(cuda):
        pytest.skip(f"CUDA {cuda} does not know sm_{architecture}")
    wrong = []
    for specialisation in of_kernel(architecture, kernel):
        try:
            check(specialisation, architecture, cuda)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_older_compiler_takes_every_kernel(kernel):
    """It refuses some C++ that the newer one takes, such as a lambda's `auto` parameters."""
    assert EVERY_OPTION in compiler(12)
    kinds_of_tiles = ("TALL", "TILE_ROWS")
    found = of_kernel(EVERY_OPTION, kernel)
    check(max(found, key=lambda s: [s.values.get(name, "") for name in kinds_of_tiles]), EVERY_OPTION, 12)


@pytest.mark.parametrize(("dtype", "gate"), [("float16", "GATE_RECOMPUTE"), ("bfloat16", "GATE_BITS")])
def test_sums_of_a_row_of_pairs_are_in_registers(dtype, gate):
    compiler(13)
    wanted = {"ELEMENT": dtype, "KIND": "Sums", "GATE": gate, "TILE_ROWS": "1", "TALL": "0"}
    found = [s for s in of_kernel(100, "reduce_rows") if wanted.items() <= s.values.items()]
    assert found
    for specialisation in found:
        check(specialisation, 100)


# --- the checks find what they are for --------------------------------------------------------------------------------


PLANTED = {
    "check_exact": """
        extern "C" __global__ void f(const float* x, float* y) {{ {} }}
    """,
    "check_registers": """
        extern "C" __global__ void __launch_bounds__({}) f(const float* x, float* y, int n) {{
            float v[200]; // kept in registers unless indexed by what only the device knows
        #pragma unroll
            for (int i = 0; i < 200; ++i) v[i] = x[i * n];
            __syncthreads();
            {}
        }}
    """,
}
ALL = '_Pragma("unroll") for (int i = 0; i < 200; ++i) y[i * n + n] = v[199 - i];'


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("*y = *x * 3.0f;", "mul.ftz.f32"),
        ("*y = __fmaf_rn(*x, *x, 3.0f);", "fma.rn.ftz.f32"),
        ("*y = __fdividef(*x, y[1]);", "div.approx.ftz.f32"),
        ("*(double*)y = *(const double*)x * 3.0 + 1.0;", "fma.rn.f64"),
    ],
)
def test_inexact_arithmetic_is_found(statement, found):
    compiler(13)
    kernel = nvrtc.compile(PLANTED["check_exact"].format(statement), (), 90)["f"]
    with pytest.raises(AssertionError, match=re.escape(found)):
        check_exact(kernel)


def test_only_the_quotient_may_fuse():
    compiler(13)
    (source,) = re.findall(r"^#define QUOTIENT.*?^    }$", translation_unit("slab"), re.MULTILINE | re.DOTALL)
    source = f"""#define EXACT __device__
        template <class Acc> constexpr Acc LEAST = -0x1p127f;
        {source}
        QUOTIENT(float, "f32", "f")
        extern "C" __global__ void f(const float* x, float* y) {{ *y = quotient(*x, 3.0f, x[1]); }}"""
    check_exact(nvrtc.compile(source, (), 90)["f"])
    for right, wrong in (("rest, %3, q", "q, %3, q"), ("max", "min"), ("quotient */", "other */")):
        changed = source.replace(right, wrong)
        assert changed != source
        with pytest.raises(AssertionError, match=r"fma\.rn\.f32"):
            check_exact(nvrtc.compile(changed, (), 90)["f"])


@pytest.mark.parametrize(
    ("bounds", "statement", "found"),
    [
        ("256", "y[0] = v[n];", "bytes of local memory"),
        ("1024", ALL, "bytes of (local memory|spills)"),
    ],
)
def test_local_memory_is_found(bounds, statement, found):
    compiler(13)
    kernel = nvrtc.compile(PLANTED["check_registers"].format(bounds, statement), (), 90)["f"]
    with pytest.raises(AssertionError, match=found):
        check_registers(kernel)


def test_too_many_registers_are_found():
    kernel = nvrtc.Kernel(".maxntid 256, 1, 1\n.minnctapersm 4\n", registers=72, stack_bytes=0, spill_bytes=0)
    with pytest.raises(AssertionError, match="72 registers, 4 blocks of 256"):
        check_registers(kernel)
    check_registers(kernel._replace(registers=64))


def test_narrow_loads_and_stores_are_found():
    options = ("-DELEMENT=float", "-DOPERATION=NORMALIZE", "-DRESIDUAL=1", "-DRELU=0", "-DKEEP_BITS=0")
    specialisation = Specialisation("apply_rows", "apply_rows", options)
    wide = "ld.global.v4.u32 \n" * 4 + "st.global.v4.u32 \n" * 2
    check_vectors(specialisation, nvrtc.Kernel(wide, 32, 0, 0))
    for narrow in (wide.replace("ld.global.v4.u32", "ld.global.u32", 1), wide.replace("st.global.v4", "st.global", 1)):
        with pytest.raises(AssertionError, match="of 16 bytes, not"):
            check_vectors(specialisation, nvrtc.Kernel(narrow, 32, 0, 0))


def test_a_mistake_in_a_kernel_is_reported_where_it_is():
    compiler(13)
    with pytest.raises(nvrtc.CompileError, match=r'tile\.cuh\(3\): error: identifier "undefined"'):
        nvrtc.compile('#line 3 "tile.cuh"\nextern "C" __global__ void f(int* x) { *x = undefined; }', (), 90)
