"""Machine code of a kernel, executed on the CPU for some of its blocks, and how many instructions each warp issues.

An instruction counts once for a warp, however many of its lanes execute it. Of a warp whose lanes part, those that are
behind in the code go first, until all are together again: a device may take more turns than that, never fewer.
Copies are done at once. Who sleeps goes on when nobody else can.
"""

from typing import NamedTuple

import numpy as np

from tests.cuda.machine.addresses import address, bytes_of, put_words, words_of
from tests.cuda.machine.floats import FLOATS
from tests.cuda.machine.integers import INTEGERS
from tests.cuda.machine.listing import Code, target
from tests.cuda.machine.registers import (
    LOCAL,
    PREDICATE,
    Registers,
    Unknown,
    predicate,
    put_predicate,
    put_word,
    register,
    word,
)

PARAMETERS = 0x210  # where they are among the constants, for compute capability 9.0
WARP = 32
EVERY_LANE = 16  # behind the numbered barriers of lanes: the one of all of a warp
STATIC = 48 << 10  # bytes of shared memory that a kernel may have besides what is asked for
MOST_TURNS = 3_000_000
SHARED_WINDOW = 0x7F00  # high word of a generic address of shared memory
SHARED_OFFSET = 0x400  # where a block's memory begins in it

NOTHING = {"NOP", "LDGDEPBAR", "DEPBAR", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "UCGABAR_ARV", "ENDCOLLECTIVE"}
"""Instructions that order what is done in order here."""


class Counts(NamedTuple):
    """Instructions of every (block, warp) in each phase, from one barrier of the block to the next."""

    all: np.ndarray  # (blocks, warps, phases)
    double: np.ndarray  # of these, such of float64
    reads: np.ndarray  # (blocks, phases): whether elements of x are read
    writes: np.ndarray  # whether elements of y are written


class Machine:
    """Threads of some blocks and what they share."""

    def __init__(self, code: Code, launch, parameters: bytes, memory, first: int, blocks: int) -> None:
        threads = blocks * launch.threads
        lanes = np.arange(threads, dtype=np.uint64)
        block = lanes // np.uint64(launch.threads)
        special = {
            "SR_TID.X": lanes % np.uint64(launch.threads),
            "SR_CTAID.X": block + np.uint64(first),
            "SR_CgaCtaId": (block + np.uint64(first)) % np.uint64(launch.cluster),
            "SR_SWINHI": np.full(threads, SHARED_WINDOW, np.uint64),
            "SR_LANEID": lanes % np.uint64(WARP),
            "SR_LTMASK": (np.uint64(1) << lanes % np.uint64(WARP)) - np.uint64(1),
        }
        constants = bytearray(PARAMETERS) + bytes(parameters)
        constants[0:4] = launch.threads.to_bytes(4, "little")
        constants[0xC:0x10] = launch.grid.to_bytes(4, "little")
        self.code, self.memory = code, memory
        self.state = Registers(threads, bytes(constants), special)
        self.block = block.astype(np.int64)
        self.blocks, self.cluster, self.warps = blocks, launch.cluster, launch.threads // WARP
        self.shared = np.zeros((blocks, SHARED_OFFSET + launch.shared_bytes + STATIC), np.uint8)
        self.gone = np.zeros(threads, bool)
        self.at = {0: np.arange(threads)}  # lanes that can go on, by their next instruction
        self.waiting = np.full(threads, -1)  # for a barrier of blocks: behind which instruction
        self.members = np.zeros((EVERY_LANE + 1, threads), bool)
        self.members[EVERY_LANE] = True
        self.arrived = np.full((EVERY_LANE + 1, threads), -1)
        self.asleep: list[tuple[int, np.ndarray]] = []
        self.phase = np.zeros(blocks, int)
        self.reads: set[tuple[int, int]] = set()  # (block, phase)
        self.writes: set[tuple[int, int]] = set()
        self.counts: list[np.ndarray] = []
        self._do = [None] * len(code.instructions)

    def run(self) -> Counts:
        with np.errstate(all="ignore"):
            turns = 0
            while self.at or self._wake():
                turns += 1
                if turns > MOST_TURNS:
                    raise RuntimeError("no end")
                here = min(self.at)
                self._step(here, self.at.pop(here))
        if not self.gone.all():
            raise RuntimeError("threads wait for one another")
        counted = np.array(self.counts)
        shape = (-1, 2, self.blocks, self.warps)
        counted = counted.reshape(shape).transpose(1, 2, 3, 0)
        touched = np.zeros((2, self.blocks, counted.shape[-1]), bool)
        for kind, found in enumerate((self.reads, self.writes)):
            for place in found:
                touched[kind][place] = True
        return Counts(*counted, *touched)

    def _step(self, here: int, lanes: np.ndarray) -> None:
        instruction = self.code.instructions[here]
        self._count(instruction, lanes)
        acting = lanes
        if instruction.guard:
            acting = lanes[predicate(instruction.guard)(self.state, lanes)]
        name = instruction.name.partition(".")[0]
        if flow := getattr(self, f"_{name.lower()}", None):
            flow(here, lanes, acting, instruction)
            return
        if len(acting):
            if self._do[here] is None:
                self._do[here] = self._made(instruction, name)
            self._do[here](self.state, slice(None) if len(acting) == self.state.threads else acting)
        self._go(here + 1, lanes)

    def _made(self, instruction, name):
        if name in NOTHING:
            return lambda s, a: None
        if make := INTEGERS.get(name) or FLOATS.get(name):
            return make(instruction.name, list(instruction.operands))
        if name in ("LDL", "STL", "LDG", "LDS", "LD", "STG", "STS", "ST", "LDGSTS", "ATOMG", "SHFL", "VOTE", "VOTEU"):
            return getattr(self, f"made_{name.lower()}")(instruction.name, list(instruction.operands))
        raise Unknown(f"{instruction.name} {instruction.operands}")

    def _go(self, there: int, lanes: np.ndarray) -> None:
        if len(lanes):
            self.at[there] = np.sort(np.concatenate((self.at[there], lanes))) if there in self.at else lanes

    def _count(self, instruction, lanes) -> None:
        warps = lanes // WARP
        first = np.ones(len(warps), bool)
        first[1:] = warps[1:] != warps[:-1]
        warps = warps[first]
        phases = self.phase[warps // self.warps]
        while len(self.counts) <= phases.max():
            self.counts.append(np.zeros((2, self.blocks * self.warps), np.int64))
        for phase in range(phases.min(), phases.max() + 1):
            of_phase = warps[phases == phase]
            self.counts[phase][0, of_phase] += 1
            if instruction.is_double:
                self.counts[phase][1, of_phase] += 1

    # --- where to go on ---

    def _bra(self, here, lanes, acting, instruction):
        if "DIV" in instruction.name:  # where not all lanes that are expected are together
            expected = word(instruction.operands[0])(self.state, lanes)
            together = np.bincount(lanes // WARP, minlength=self.blocks * self.warps)[lanes // WARP]
            acting = lanes[together != np.array([int(v).bit_count() for v in expected])]
        else:
            for text in instruction.operands[:-1]:
                acting = acting[predicate(text)(self.state, acting)]
        self._part(here, lanes, acting, target(self.code, instruction))

    def _part(self, here, lanes, acting, there):
        if len(acting) == len(lanes):
            self._go(there, lanes)
        elif not len(acting):
            self._go(here + 1, lanes)
        else:
            self._go(there, acting)
            self._go(here + 1, np.setdiff1d(lanes, acting, assume_unique=True))

    def _call(self, here, lanes, acting, instruction):
        self._part(here, lanes, acting, target(self.code, instruction))

    def _ret(self, here, lanes, acting, instruction):
        back = word(instruction.operands[0].split()[0])(self.state, acting)
        for there in np.unique(back):
            self._go(self.code.addresses[int(there)], acting[back == there])
        self._go(here + 1, np.setdiff1d(lanes, acting, assume_unique=True))

    def _exit(self, here, lanes, acting, instruction):
        self.gone[acting] = True
        self._go(here + 1, np.setdiff1d(lanes, acting, assume_unique=True))
        for barrier in np.unique(np.nonzero((self.arrived >= 0).any(axis=1))[0]):
            self._release_lanes(barrier)
        self._release_blocks()

    def _nanosleep(self, here, lanes, acting, instruction):
        self.asleep.append((here + 1, acting))
        self._go(here + 1, np.setdiff1d(lanes, acting, assume_unique=True))

    def _wake(self) -> bool:
        """Whether somebody slept."""
        sleepers, self.asleep = self.asleep, []
        for there, lanes in sleepers:
            self._go(there, lanes)
        return bool(sleepers)

    # --- barriers ---

    def _bssy(self, here, lanes, acting, instruction):
        barrier = int(instruction.operands[0][1:])
        warps = np.unique(acting // WARP)
        self.members[barrier].reshape(-1, WARP)[warps] = False
        self.members[barrier][acting] = True
        self._go(here + 1, lanes)

    def _bsync(self, here, lanes, acting, instruction):
        self._wait_for_lanes(here, lanes, acting, int(instruction.operands[0][1:]))

    def _warpsync(self, here, lanes, acting, instruction):
        if "ALL" not in instruction.name:
            raise Unknown(instruction.name)
        self._wait_for_lanes(here, lanes, acting, EVERY_LANE)

    def _wait_for_lanes(self, here, lanes, acting, barrier):
        self.arrived[barrier][acting] = here + 1
        if len(acting) < len(lanes):
            self._go(here + 1, np.setdiff1d(lanes, acting, assume_unique=True))
        self._release_lanes(barrier)

    def _release_lanes(self, barrier):
        arrived = self.arrived[barrier]
        there = (arrived >= 0) | self.gone | ~self.members[barrier]
        free = np.repeat(there.reshape(-1, WARP).all(axis=1), WARP) & (arrived >= 0)
        for place in np.unique(arrived[free]):
            self._go(int(place), np.nonzero(free & (arrived == place))[0])
        arrived[free] = -1

    def _bar(self, here, lanes, acting, instruction):
        if instruction.operands != ("0x0",):
            raise Unknown(f"{instruction.name} {instruction.operands}")
        self.waiting[acting] = here + 1
        self._go(here + 1, np.setdiff1d(lanes, acting, assume_unique=True))
        self._release_blocks()

    def _release_blocks(self, blocks_together=1):
        there = ((self.waiting >= 0) | self.gone).reshape(-1, self.warps * WARP * blocks_together).all(axis=1)
        free = np.repeat(there, self.warps * WARP * blocks_together) & (self.waiting >= 0)
        if free.any():
            self.phase[np.unique(self.block[free])] += 1
            for place in np.unique(self.waiting[free]):
                self._go(int(place), np.nonzero(free & (self.waiting == place))[0])
            self.waiting[free] = -1

    def _ucgabar_wait(self, here, lanes, acting, instruction):
        self.waiting[acting] = here + 1
        self._release_blocks(self.cluster)

    # --- memory, and other lanes ---

    def _load(self, a, addresses, size):
        self._touch(self.reads, a, self.memory.is_read(addresses))
        return self.memory.load(addresses, size)

    def _touch(self, found, a, lanes):
        for block in np.unique(self.block[a][lanes]):
            found.add((block, self.phase[block]))

    def made_ldg(self, name, operands):
        put, where, size = put_words(operands[0], name), address(operands[1]), bytes_of(name)
        return lambda s, a: put(s, a, self._load(a, where(s, a), size))

    def made_stg(self, name, operands):
        where, size = address(operands[0]), bytes_of(name)
        read = words_of(operands[1], size)

        def act(s, a):
            addresses = where(s, a)
            self._touch(self.writes, a, self.memory.is_written(addresses))
            self.memory.store(addresses, read(s, a))

        return act

    def made_atomg(self, name, operands):
        if ".ADD." not in name or ".64" in name:
            raise Unknown(name)
        put, where, addend = put_word(operands[1]), address(operands[2]), word(operands[3])

        def act(s, a):
            addresses = where(s, a)
            put(s, a, self.memory.add(addresses, np.broadcast_to(addend(s, a), addresses.shape)))

        return act

    def _place(self, s, a, addresses, size):
        """Of shared memory: which block's, and where."""
        rank = (addresses >> np.uint64(24)).astype(np.int64) & 255
        of_block = self.block[a]
        return (of_block - of_block % self.cluster + rank)[:, None], (
            (addresses & np.uint64(0xFFFFFF)).astype(np.int64)[:, None] + np.arange(size)
        )

    def made_lds(self, name, operands):
        put, where, size = put_words(operands[0], name), address(operands[1]), bytes_of(name)
        return lambda s, a: put(s, a, self.shared[self._place(s, a, where(s, a), size)])

    made_ld = made_lds  # kernels read memory of other blocks by generic addresses, nothing else

    def made_sts(self, name, operands):
        where, size = address(operands[0]), bytes_of(name)
        read = words_of(operands[1], size)

        def act(s, a):
            self.shared[self._place(s, a, where(s, a), size)] = read(s, a)

        return act

    @staticmethod
    def _of_thread(s, a, addresses, size):
        """Of local memory: whose, and where."""
        return np.arange(s.threads)[a][:, None], (addresses.astype(np.int64)[:, None] + np.arange(size)) % LOCAL

    def made_ldl(self, name, operands):
        put, where, size = put_words(operands[0], name), address(operands[1]), bytes_of(name)
        return lambda s, a: put(s, a, s.local[self._of_thread(s, a, where(s, a), size)])

    def made_stl(self, name, operands):
        where, size = address(operands[0]), bytes_of(name)
        read = words_of(operands[1], size)

        def act(s, a):
            s.local[self._of_thread(s, a, where(s, a), size)] = read(s, a)

        return act

    def made_ldgsts(self, name, operands):
        into, where, size = address(operands[0]), address(operands[1]), bytes_of(name)

        def act(s, a):
            self.shared[self._place(s, a, into(s, a), size)] = self._load(a, where(s, a), size)

        return act

    def made_shfl(self, name, operands):
        inside, put = put_predicate(operands[0]), put_word(operands[1])
        file, index = register(operands[2])
        by, bounds = word(operands[3]), word(operands[4])
        mode = name.split(".")[1]

        def act(s, a):
            lanes = np.arange(s.threads)[a]
            lane = lanes % WARP
            offset, clamp = by(s, a).astype(np.int64), bounds(s, a).astype(np.int64)
            mask, last = clamp >> 8 & 31, clamp & 31
            low = lane & mask
            high = low | last & ~mask
            source = {"BFLY": lane ^ offset, "DOWN": lane + offset, "UP": lane - offset}.get(
                mode, low | offset & ~mask & 31
            )
            there = source >= high if mode == "UP" else source <= high
            inside(s, a, there)
            values = s.words[file][index] if index is not None else np.zeros(s.threads, np.uint32)
            put(s, a, values[lanes - lane + np.where(there, source, lane)].astype(np.uint64))

        return act

    def made_vote(self, name, operands):
        mode = name.split(".")[1]
        given = predicate(operands[-1])
        first = operands[0]

        def act(s, a):
            lanes = np.arange(s.threads)[a]
            votes = np.zeros(s.threads, bool)
            votes[lanes] = given(s, a)
            if mode == "ANY" and PREDICATE.match(first):
                put_predicate(first)(s, a, votes.reshape(-1, WARP).any(axis=1)[lanes // WARP])
            else:
                ballot = (votes.reshape(-1, WARP) << np.arange(WARP, dtype=np.uint64)).sum(axis=1).astype(np.uint64)
                put_word(first)(s, a, ballot[lanes // WARP])

        return act

    made_voteu = made_vote
