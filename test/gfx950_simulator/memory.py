"""Byte-addressed memory that knows which bytes a kernel may touch and which have been written."""

import numpy as np

ACCESSIBLE, WRITTEN = 1, 2
GUARD = 1 << 16
"""Bytes that belong to nobody between two buffers of device memory."""


class Memory:
    """``size`` bytes, none accessible; ``state`` holds ACCESSIBLE and WRITTEN of each."""

    def __init__(self, size: int):
        self.size = size
        padded = size + 64  # so that a window of any access fits at every byte
        self.data = np.zeros(padded, np.uint8)
        self.state = np.zeros(padded, np.uint8)
        self._windows = {}

    def _window(self, name: str, nbytes: int) -> np.ndarray:
        """The bytes of ``data`` or ``state`` as overlapping items of ``nbytes``, one at every byte."""
        key = name, nbytes
        if key not in self._windows:
            array = getattr(self, name)
            self._windows[key] = np.ndarray((array.size - nbytes + 1,), f"V{nbytes}", array, strides=(1,))
        return self._windows[key]

    def _gather(self, name: str, index: np.ndarray, nbytes: int) -> np.ndarray:
        if nbytes == 1:
            return getattr(self, name)[index][:, None]
        return self._window(name, nbytes)[index].view(np.uint8).reshape(-1, nbytes)

    def read(self, index: np.ndarray, nbytes: int) -> np.ndarray:
        """index [k] -> bytes [k, nbytes]."""
        return self._gather("data", index, nbytes)

    def states(self, index: np.ndarray, nbytes: int) -> np.ndarray:
        return self._gather("state", index, nbytes)

    def write(self, index: np.ndarray, values: np.ndarray) -> None:
        """values [k, nbytes] at index [k]; of two to one byte the one of the higher position stays."""
        nbytes = values.shape[1]
        self._window("data", nbytes)[index] = np.ascontiguousarray(values).view(f"V{nbytes}")[:, 0]

    def mark(self, index: np.ndarray, written: np.ndarray) -> None:
        """written [k, nbytes] bool: whether what was stored there is defined."""
        values = (ACCESSIBLE | WRITTEN * written).astype(np.uint8)
        nbytes = values.shape[1]
        self._window("state", nbytes)[index] = np.ascontiguousarray(values).view(f"V{nbytes}")[:, 0]


class Buffer:
    """A range of device memory."""

    def __init__(self, name: str, start: int, content: np.ndarray):
        self.name, self.start, self.content = name, start, content

    @property
    def end(self) -> int:
        return self.start + self.content.size


class DeviceMemory(Memory):
    """Global memory: buffers that stand for allocations of the host, with guard bytes between them.

    A buffer shows the host's bytes as they were when it was added; :meth:`copy_back` gives the host what kernels wrote.
    """

    BASE = 0x7F00_0000_0000
    """Address of the first byte."""

    def __init__(self, allocations: dict[str, tuple[np.ndarray, bool]], reserve: int = 1 << 16):
        """allocations: bytes and whether they are initialised, by name; reserve: room for kernel arguments."""
        self.buffers: dict[str, Buffer] = {}
        start = GUARD + reserve
        for name, (content, _) in allocations.items():
            start += content.ctypes.data % 256  # the host's alignment, which kernels may have been compiled for
            self.buffers[name] = Buffer(name, start, content)
            start = -(-(start + content.size + GUARD) // 4096) * 4096
        super().__init__(start)
        self.arguments = Buffer("kernel arguments", GUARD, np.zeros(reserve, np.uint8))
        for name, (content, initialised) in allocations.items():
            buffer = self.buffers[name]
            self.data[buffer.start : buffer.end] = content
            self.state[buffer.start : buffer.end] = WRITTEN * initialised

    def address(self, name: str, offset: int = 0) -> int:
        return self.BASE + self.buffers[name].start + offset

    def grant(self, ranges: list[tuple[int, int]]) -> None:
        """Make these (address, bytes) accessible, and nothing else."""
        self.state &= WRITTEN
        for address, size in ranges:
            start = address - self.BASE
            self.state[start : start + size] |= ACCESSIBLE

    def set_arguments(self, content: bytes, written: np.ndarray) -> int:
        """Place a kernel argument segment; returns its address."""
        start, size = self.arguments.start, len(content)
        self.data[start : start + size] = np.frombuffer(content, np.uint8)
        self.state[start : start + self.arguments.content.size] = 0
        self.state[start : start + size] = np.where(written, WRITTEN, 0)
        return self.BASE + start

    def copy_back(self) -> None:
        for buffer in self.buffers.values():
            buffer.content[:] = self.data[buffer.start : buffer.end]

    def describe(self, address: int) -> str:
        """Where an address lies, for an error."""
        index = address - self.BASE
        nearest = min(
            (self.arguments, *self.buffers.values()),
            key=lambda buffer: max(buffer.start - index, index - buffer.end + 1, 0),
        )
        place = f"byte {index - nearest.start} of '{nearest.name}', which has {nearest.content.size}"
        return f"address {address:#x} ({place})"
