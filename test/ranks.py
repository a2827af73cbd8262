"""Processes that are the ranks of a group, kept for many tests: :class:`Ranks`."""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 30
"""Seconds that a rank waits for another one; a test waits twice as long for an answer."""


def _serve(connection, backend: str, rank: int, world_size: int, store: str, timeout: float) -> None:
    """A rank: runs the functions that it is sent, and sends back what they return or the traceback."""
    os.environ["MXFP8MOE_TEST_DEVICE"] = "cpu"  # where tests' inputs are made; ``device`` says where they go
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    init = dict(init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    if backend == "nccl":
        init["device_id"] = device
    dist.init_process_group(backend, **init)
    with contextlib.suppress(EOFError):
        while True:
            function, kwargs = connection.recv()
            try:
                connection.send((True, function(dist.group.WORLD, device, **kwargs)))
            except Exception:
                connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``world_size`` processes with a default group of ``backend``; on NCCL, one GPU each."""

    def __init__(self, backend: str, world_size: int, timeout: float = TIMEOUT):
        if backend == "nccl":
            context = multiprocessing.get_context("spawn")
        else:
            context = multiprocessing.get_context("forkserver")  # imports once, what the first rank needs
            context.set_forkserver_preload(["torch_mxfp8moe.distributed", "test_distributed"])
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.processes, self.connections = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            args = (theirs, backend, rank, world_size, store, timeout)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(mine)

    def start(self, function, **kwargs) -> None:
        """``function(group, device, **kwargs)`` on every rank."""
        for connection in self.connections:
            connection.send((function, kwargs))

    def result(self, rank: int, timeout: float = 2 * TIMEOUT) -> tuple[bool | None, object]:
        """(True, what it returned), (False, its traceback), or (None, exit status) if the process ended."""
        connection = self.connections[rank]
        assert connection.poll(timeout), f"rank {rank} has not answered in {timeout} s"
        try:
            return connection.recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(timeout)
            return None, self.processes[rank].exitcode

    def __call__(self, function, **kwargs) -> list:
        """What ``function`` returned on each rank; fails where it raised."""
        self.start(function, **kwargs)
        results = [self.result(rank) for rank in range(len(self.connections))]
        wrong = [f"rank {rank}: {what}" for rank, (fine, what) in enumerate(results) if not fine]
        assert not wrong, "\n".join(wrong)
        return [what for _, what in results]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()
