"""Global memory of executed machine code."""

import ctypes

import numpy as np


class Memory:
    """Global memory that begins at these addresses; each piece repeats what is given for it, and forgets all writes but
    what is added.
    """

    SPACE = 1 << 40

    def __init__(self, pieces: dict[int, np.ndarray], watched: int, written: int = 0) -> None:
        self.watched, self.written = watched // self.SPACE, written // self.SPACE
        self._read: list[tuple[np.ndarray, int]] = []  # where accesses begin, how long they are
        self.pieces = {base // self.SPACE: values.view(np.uint8) for base, values in pieces.items()}

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        loaded = np.empty((len(addresses), size), np.uint8)
        spaces = addresses // np.uint64(self.SPACE)
        for space in np.unique(spaces):
            here, values = spaces == space, self.pieces[int(space)]
            where = (addresses[here] % np.uint64(self.SPACE)).astype(np.int64)[:, None] + np.arange(size)
            loaded[here] = values[where % len(values)]
            if space == self.watched:
                self._read.append((where[:, 0], size))
        return loaded

    def is_read(self, addresses: np.ndarray) -> np.ndarray:
        """Whether these are of the piece that is watched."""
        return addresses // np.uint64(self.SPACE) == self.watched

    def is_written(self, addresses: np.ndarray) -> np.ndarray:
        """Whether these are of the piece that results go to."""
        return addresses // np.uint64(self.SPACE) == self.written

    def bytes_read(self) -> int:
        """Of the watched piece, however often each."""
        unit = min(size for _, size in self._read)  # every access begins at a multiple of its size
        units = [(starts[:, None] + np.arange(0, size, unit)).ravel() for starts, size in self._read]
        return unit * len(np.unique(np.concatenate(units)))

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        for space in np.unique(addresses // np.uint64(self.SPACE)):
            assert int(space) in self.pieces

    def add(self, addresses: np.ndarray, values: np.ndarray) -> np.ndarray:
        """One after the other, to words; what was there before."""
        before = np.empty(len(addresses), np.uint64)
        for i, where in enumerate(map(int, addresses)):
            words = self.pieces[where // self.SPACE].view(np.uint32)
            at = where % self.SPACE // 4 % len(words)
            before[i] = words[at]
            words[at] += np.uint32(values[i])
        return before


class OwnMemory:
    """That of this process."""

    def __init__(self) -> None:
        self.bytes = np.frombuffer((ctypes.c_uint8 * ((1 << 47) - 4096)).from_address(4096), np.uint8)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return self.bytes[(addresses.astype(np.int64) - 4096)[:, None] + np.arange(size)]

    def is_read(self, addresses: np.ndarray) -> np.ndarray:
        return np.zeros(len(addresses), bool)

    is_written = is_read

    def add(self, addresses: np.ndarray, values: np.ndarray) -> np.ndarray:
        before = np.empty(len(addresses), np.uint64)
        for i in range(len(addresses)):
            word = self.load(addresses[i : i + 1], 4).view(np.uint32)[0]
            before[i] = word[0]
            self.store(addresses[i : i + 1], (word + values[i].astype(np.uint32)).view(np.uint8)[None])
        return before

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        self.bytes[(addresses.astype(np.int64) - 4096)[:, None] + np.arange(values.shape[1])] = values
