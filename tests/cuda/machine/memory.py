"""Global memory of executed machine code."""

import ctypes

import numpy as np


class Memory:
    """Global memory that begins at these addresses; each piece repeats what is given for it, and forgets writes."""

    SPACE = 1 << 40

    def __init__(self, pieces: dict[int, np.ndarray], watched: int) -> None:
        self.watched = watched // self.SPACE
        self._read: list[np.ndarray] = []
        self.pieces = {base // self.SPACE: values.view(np.uint8) for base, values in pieces.items()}

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        loaded = np.empty((len(addresses), size), np.uint8)
        spaces = addresses // np.uint64(self.SPACE)
        for space in np.unique(spaces):
            here, values = spaces == space, self.pieces[int(space)]
            where = (addresses[here] % np.uint64(self.SPACE)).astype(np.int64)[:, None] + np.arange(size)
            loaded[here] = values[where % len(values)]
            if space == self.watched:
                self._read.append(where.ravel())
        return loaded

    def seen(self) -> np.ndarray:
        """Bytes of the watched piece that were read."""
        return np.unique(np.concatenate(self._read))

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        for space in np.unique(addresses // np.uint64(self.SPACE)):
            assert int(space) in self.pieces


class OwnMemory:
    """That of this process."""

    def __init__(self) -> None:
        self.bytes = np.frombuffer((ctypes.c_uint8 * ((1 << 47) - 4096)).from_address(4096), np.uint8)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return self.bytes[(addresses.astype(np.int64) - 4096)[:, None] + np.arange(size)]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        self.bytes[(addresses.astype(np.int64) - 4096)[:, None] + np.arange(values.shape[1])] = values
