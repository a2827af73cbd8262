"""Kernels compiled in many processes at once, into Triton's cache, where the process with the GPU finds them.

Each compilation has a process of its own, forked from one that has imported everything: a compiler that crashes, or
does not end, costs one candidate.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait

from shapes import Row

from . import tuning
from .peers import in_layout, label

SECONDS = 180.0
"""After which a compilation is given up."""


@dataclass(frozen=True)
class Task:
    """A part of a call, to be compiled; what it takes to make the call anew without tensors."""

    row: Row
    tokens: tuple[int, ...]
    """The calls' numbers of tokens; most likely they need the same kernel."""
    activations: str
    arch: str
    part: str
    """One of ``tuning.PARTS``."""
    rule: str
    gemm1: str
    gemm2: str
    """Keys of ``tuning``."""
    layout: str = "row_major"

    def launches(self) -> list:
        """Those of the part, bound, on tensors without memory."""
        from torch_mxfp8moe.backends.triton.fused_moe import plan
        from torch_mxfp8moe.backends.triton.targets import Target

        tiles = tuning.tiles_of(*map(json.loads, (self.rule, self.gemm1, self.gemm2)))
        weights = in_layout(self.row.weights("meta"), self.layout)
        options = dict(activation_dtype=self.activations, layout=self.layout)
        result = []
        for T in self.tokens:
            call = self.row.call(T, "meta", weights, **options).with_out()
            made = plan(call, Target(self.arch), tiles)
            bound = made.bind(call.inputs | {"out": call.out}, call.device)
            result += [one for free, one in zip(made.launches, bound) if is_of(free, self.part)]
        return result


def is_of(launch, part: str) -> bool:
    """Whether a plan's launch is of that part of a call: a product's reads its weights; the base is all of it."""
    return part == tuning.BASE or label(launch).split()[1:] == [{"gemm1": "w1", "gemm2": "w2"}[part]]


def settle_keys() -> None:
    """To be called before any kernel is used, here and in the processes that compile: Triton's key of a kernel in its
    cache may depend on which others were met before that call the same functions (seen in 3.6), so all are met here, in
    one order."""
    from torch_mxfp8moe.backends.triton import gemm, matvec, memory, numerics, overlap, quantize, routing

    modules = [numerics, memory, overlap, routing, gemm, matvec, quantize]
    with suppress(ImportError):  # as in fused_moe
        from torch_mxfp8moe.backends.triton import hopper, matvec_mma

        modules += [hopper, matvec_mma]
    for module in modules:
        for value in vars(module).values():
            getattr(value, "cache_key", None)


def _work(task: Task, cache: str, pipe) -> None:
    from torch_mxfp8moe.backends.triton.launch import compile_offline
    from torch_mxfp8moe.backends.triton.targets import Target
    from triton import knobs

    settle_keys()
    knobs.cache.dir = cache  # this process's environment is that of the one it was forked from
    try:
        compile_offline(task.launches(), Target(task.arch))
        pipe.send("")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}"[:500])


PRELOADED = ("__main__", "bench.preloaded")


def _context():
    """Processes are forked from one that has imported all that a compilation needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # until 3.12 it imports nothing from this process's path
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def compile_all(tasks: Iterable[Task], jobs: int, seconds: float = SECONDS) -> Iterator[tuple[Task, str]]:
    """Yields each task as it is done, and why it failed ("" if it did not)."""
    from triton import knobs

    context = _context()
    waiting, running = list(tasks)[::-1], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(task, knobs.cache.dir, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = task, process, time.monotonic() + seconds
            first = min(end for *_, end in running.values())
            ready = wait(list(running), timeout=max(0.0, first - time.monotonic()))
            late = [r for r, (*_, end) in running.items() if r not in ready and time.monotonic() >= end]
            for receiver in (*ready, *late):
                task, process, _ = running.pop(receiver)
                if receiver in late:
                    process.kill()
                    said = f"did not end in {seconds:.0f} s"
                else:
                    try:
                        said = receiver.recv()
                    except EOFError:
                        process.join()
                        said = f"the compiler ended with exit status {process.exitcode}"
                process.join()
                receiver.close()
                yield task, said
    finally:
        for receiver, (_, process, _) in running.items():
            process.kill()
            process.join()
            receiver.close()
