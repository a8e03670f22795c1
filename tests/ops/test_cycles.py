"""Counting cycles (asv_benchmarks/cycles.py): which way a kernel takes is found, and each element's share is right."""

import ctypes
import importlib
import re
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "asv_benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """Imports a module of the scripts' folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module


MODULE = """\
define void @kernel(i64 %stop, i64 %worker) {
entry:
  br label %loop, !llvm.loop !0

loop:                                             ; preds = %odd, %loop, %entry
  %i = phi i64 [ 0, %entry ], [ %next, %loop ], [ %next, %odd ]
  %next = add i64 %i, 1
  switch i64 %i, label %loop [
    i64 1, label %odd
    i64 3, label %odd
    i64 5, label %end
  ]

odd:                                              ; preds = %loop, %loop
  call void @other()
  br label %loop

end:                                              ; preds = %loop
  ret void
}

define void @other() {
  ret void
}

!0 = distinct !{!0}
"""
BLOCKS_OF_A_RUN = [0, 1, 1, 2, 4, 1, 1, 2, 4, 1, 1, 3]


def test_every_instruction_has_the_line_of_its_block_and_every_function_a_scope(scripts):
    text = scripts("blocks").located(MODULE)
    llvm.parse_assembly(text).verify()
    lines = {place: int(line) for place, line in re.findall(r"(!\d+) = !DILocation\(line: (\d+)", text)}
    found = [(code, lines[place]) for code, place in re.findall(r"^  (.*), !dbg (!\d+)$", text, re.MULTILINE)]
    assert [line for _, line in found] == [1, 2, 2, 2, 3, 3, 4, 5]
    assert len(set(re.findall(r"define .* !dbg (!\d+)", text))) == 2
    assert "!0 = distinct !{!0}" in text


def test_blocks_note_that_they_run(scripts):
    room = 16
    notes = np.full(1 + room, -1)
    notes[0] = 0
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(scripts("blocks").noting(MODULE, notes.ctypes.data, room))
    engine = llvm.create_mcjit_compiler(module, llvm.Target.from_default_triple().create_target_machine(jit=True))
    engine.finalize_object()
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("kernel"))
    kernel(0, 0)
    assert notes[: 1 + notes[0]].tolist() == [len(BLOCKS_OF_A_RUN), *BLOCKS_OF_A_RUN]
    kernel(0, 0)  # the last ones are kept
    assert notes[0] == 2 * len(BLOCKS_OF_A_RUN)
    assert sorted(notes[1:]) == sorted((2 * BLOCKS_OF_A_RUN)[-room:])


X86 = """\
	.section	.rodata.cst4,"aM",@progbits,4
.LCPI0_0:
	.long	0x3f000000
kernel:
.Lfunc_begin0:
	.cfi_startproc
	pushq	%rbp
	.loc	1 1 0 prologue_end
.Ltmp0:
	xorl	%eax, %eax
	.p2align	4
.LBB0_1:
	vmovups	(%rdi), %ymm0
	.loc	1 2 0
	vaddps	%ymm0, %ymm1, %ymm1
.Ltmp1:
	vmovups	%ymm1, 32(%rsp)
	addq	$32, %rdi
	jne	.LBB0_1
	.loc	1 3 0
	retq
	.section	.debug_line,"",@progbits
.Lline_table_start0:
"""
AARCH64 = """\
kernel:
	.loc	1 1 0
	str	x19, [sp, #-16]!
	b	.LBB0_2
.LBB0_1:
	.loc	1 2 0
	ldr	q0, [x0], #16
	fadd	v1.4s, v1.4s, v0.4s
	cbnz	x1, .LBB0_1
.LBB0_2:
	.loc	1 3 0
	ret
"""


@pytest.mark.parametrize(
    ("assembly", "loop"),
    [
        (
            X86,
            (
                "vmovups\t(%rdi), %ymm0",
                "vaddps\t%ymm0, %ymm1, %ymm1",
                "vmovups\t%ymm1, 32(%rsp)",
                "addq\t$32, %rdi",
                "jne\t.LBB0_1",
            ),
        ),
        (AARCH64, ("ldr\tq0, [x0], #16", "fadd\tv1.4s, v1.4s, v0.4s", "cbnz\tx1, .LBB0_1")),
    ],
    ids=["x86-64", "AArch64"],
)
def test_machine_code_runs_where_its_block_does(scripts, assembly, loop):
    way = scripts("blocks").way(assembly, [0, 1, 1, 1, 2])
    assert len(way.pieces) == 3
    assert way.pieces[1] == loop
    assert way.order == (0, 1, 1, 1, 2)


def test_machine_code_of_blocks_that_never_ran_is_left_out(scripts):
    way = scripts("blocks").way(X86, [0, 2])
    assert [piece[-1] for piece in way.pieces] == ["xorl\t%eax, %eax", "retq"]
    assert way.order == (0, 1)


RESOURCES = ["P0", "P1", "Load.\x00", "Load.\x01"]


def region(instructions, cycles, uops, taken):
    """As llvm-mca reports 10 times through a piece of code."""
    info = [{"mayLoad": "(" in i and i.endswith("0"), "mayStore": i.endswith(")")} for i in instructions]
    pressure = [
        {"InstructionIndex": len(instructions), "ResourceIndex": i, "ResourceUsage": usage} for i, usage in taken
    ]
    pressure.append({"InstructionIndex": 0, "ResourceIndex": 0, "ResourceUsage": 100})
    return {
        "Instructions": instructions,
        "InstructionInfoView": {"InstructionList": info},
        "ResourcePressureView": {"ResourcePressureInfo": pressure},
        "SummaryView": {"Iterations": 10, "TotalCycles": 10 * cycles, "TotaluOps": 10 * uops, "DispatchWidth": 2},
    }


def test_what_pieces_cost_is_added_up_along_the_way(scripts):
    throughput = scripts("throughput")
    once = region(["mov\t8(%rsp), %r0", "mov\t%r0, (%rdi)"], 5, 2, [(0, 2.0), (2, 0.5), (3, 1.0)])
    often = region(["fadd\tv0, v1", "str\tq0, [sp, #16]", "ldr\tq0, [x0]"], 3, 3, [(1, 2.5)])
    pieces = [throughput.cost_of_region(r, RESOURCES) for r in (once, often)]
    found = throughput.together(pieces, [0, 1, 1, 1])
    assert found._asdict() == {
        "instructions": 2 + 3 * 3,
        "uops": 2 + 3 * 3,
        "cycles": 5 + 3 * 3,
        "loads": 1,
        "stores": 1,
        "stack": 1 + 3,
        "taken": {"dispatch": 1 + 3 * 1.5, "P0": 2.0, "Load": 1.0, "P1": 7.5},
    }
    assert found.bottleneck == ("P1", 7.5)


def test_the_plain_loops_of_a_kernel_of_two_steps_are_added(scripts):
    tables = scripts("cycle_tables")
    rows = [
        {"processor": "a", "kernel": kernel, "layout": layout, "array": array, "cycles": taken}
        for kernel, layout, array, taken in [
            ("train_slab", "nchw_long", "slab", 0.9),
            ("moments", "nhwc_2d", "flat", 0.8),
            ("moments", "nchw", "plain loop", 0.1),
            ("normalize", "nchw", "plain loop", 0.2),
            ("moments", "nhwc", "plain loop", 0.4),
        ]
    ]
    assert [times for _, times in tables.times_plain(rows)] == pytest.approx([3.0, 2.0])


def test_without_the_analyser_a_command_that_installs_it_is_named(scripts, monkeypatch):
    throughput = scripts("throughput")
    monkeypatch.setattr(throughput.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt-get install llvm-19"):
        throughput.analyser()
