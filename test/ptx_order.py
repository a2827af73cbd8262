"""What orders the accesses to a program's shared memory that :mod:`ptx` executes: vector clocks, of each warp and of
copies, that barriers hand on. Two accesses of which one writes, and of which neither is known to have been before the
other, are an error, in whatever order they came.

Source: Flanagan and Freund, FastTrack: Efficient and Precise Dynamic Race Detection, 2009.
"""

from collections.abc import Callable

import numpy as np


class Order:
    """Who knows of which accesses."""

    def __init__(self, size: int, warps: int):
        actors = warps + 1
        self.copies = warps
        """The last one of the actors: copies that are under way on their own."""
        self.clock = np.eye(actors, dtype=int)
        """What each actor knows of each."""
        self.copied = np.zeros((warps, actors), int)
        """What whoever waits for a warp's ``cp.async`` knows then."""
        self.writer, self.written = np.zeros((2, size), int)
        """Of each byte: who wrote it, and when; 0: nobody."""
        self.read = np.zeros((actors, size), int)
        self.fenced = np.ones(size, bool)
        """Whether the matrix unit may read it: no instruction of a warp wrote it without a fence afterwards."""

    def _check(self, known: np.ndarray, where: np.ndarray, writes: bool) -> None:
        late = self.written[where] > known[self.writer[where]]
        if writes:
            late |= (self.read[:, where] > known[:, None]).any(0)
        assert not late.any(), f"two at byte {where[late][:1]} of shared memory, and nothing orders them"

    def _write(self, actor: int, where: np.ndarray, fenced: bool) -> None:
        self.writer[where], self.written[where] = actor, self.clock[actor, actor]
        self.fenced[where] = fenced

    def access(self, warp: int, where: np.ndarray, writes: bool) -> None:
        self._check(self.clock[warp], where, writes)
        if writes:
            self._write(warp, where, False)
        else:
            self.read[warp, where] = self.clock[warp, warp]

    def read_by_matrix_unit(self, warp: int, where: np.ndarray) -> None:
        """For a warp, at any time before it waits for it."""
        self.access(warp, where, False)
        assert self.fenced[where].all(), f"no fence before the matrix unit reads byte {where[~self.fenced[where]][:1]}"

    def copy(self, where: np.ndarray, clock: np.ndarray, by: int | None = None) -> np.ndarray:
        """A copy for a warp that knew ``clock`` when it sent for it; what they know whom it tells. by: that warp, which
        sent for it by ``cp.async``."""
        self.clock[self.copies, self.copies] += 1
        clock = clock.copy()
        clock[self.copies] = self.clock[self.copies, self.copies]
        self._check(clock, where, True)
        self._write(self.copies, where, by is None)
        if by is not None:
            self.copied[by] = np.maximum(self.copied[by], clock)
        return clock

    def publish(self, warp: int) -> np.ndarray:
        """What it tells others."""
        clock = self.clock[warp].copy()
        self.clock[warp, warp] += 1
        return clock

    def learn(self, warp: int, clock: np.ndarray) -> None:
        self.clock[warp] = np.maximum(self.clock[warp], clock)

    def fence(self, warp: int) -> None:
        """Of a warp: for all that it knows of."""
        self.fenced |= self.written <= self.clock[warp][self.writer]


class Meeting:
    """``bar.sync``."""

    def __init__(self, order: Order):
        self.order = order
        self.times = 0
        self.there: set[int] = set()

    def come(self, warp: int, count: int) -> Callable[[], bool]:
        """What the warp then waits for: that ``count`` have come."""
        assert warp not in self.there
        self.there.add(warp)
        times = self.times
        if len(self.there) == count:
            known = np.max([self.order.publish(one) for one in self.there], 0)
            for one in self.there:
                self.order.learn(one, known)
            self.there = set()
            self.times += 1
        return lambda: self.times > times


class Mbarrier:
    """Arrivals and bytes of one phase after the other."""

    def __init__(self, order: Order, count: int):
        self.order = order
        self.count = self.missing = count
        self.bytes = self.phase = 0
        self.clock = self.known = np.zeros(len(order.clock), int)

    def _next(self) -> None:
        assert self.missing >= 0, "more arrivals than a phase takes"
        if self.missing == 0 and self.bytes == 0:
            self.known, self.missing, self.phase = self.clock, self.count, self.phase + 1

    def arrive(self, count: int, clock: np.ndarray) -> None:
        self.missing -= count
        self.clock = np.maximum(self.clock, clock)
        self._next()

    def expect(self, size: int) -> None:
        self.bytes += size

    def complete(self, size: int, clock: np.ndarray) -> None:
        self.bytes -= size
        self.clock = np.maximum(self.clock, clock)
        self._next()

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity

    def learn(self, warp: int) -> None:
        self.order.learn(warp, self.known)
