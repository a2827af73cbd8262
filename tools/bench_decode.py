#!/usr/bin/env python
"""Measure how a model of 24 MoE layers decodes through a CUDA graph, and that the host does nothing but replay it.

The model has the sizes of the trained one in tools/demo and its layers' weights, each layer several times over: what it
writes has no sense, but its routing is a real model's. One step takes every sequence from one token to the next: all
layers, a static key-value cache, and the likeliest token, which the device feeds to the next step itself, with its
position. The step is captured once; then a token is one replay.

Printed for the eager loop and for the replays: tokens per second, microseconds from one token to the next, microseconds
of the host for one token (on an idle device, so that the host never waits for room in the queue), and operations that
PyTorch is asked for. Checked: the replays give the tokens of the eager loop; while they run, PyTorch is asked for no
more operations and memory than by replays of a graph that adds 1 to a number (none, or what some versions do for random
numbers), and nothing waits for the device. A CPU has no graphs: there the loop is eager alone, and the program says so.

Exit status: 1 if a check failed.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent / "demo"))

import checkpoint  # noqa: E402
from bench import machine, report, timing  # noqa: E402
from model import Model  # noqa: E402
from terminal import progress  # noqa: E402

import torch_mxfp8moe  # noqa: E402

WEIGHTS = Path(__file__).resolve().parent / "demo" / "weights" / "mxfp8"
LAYERS = 24
WARM_UP = 8
"""Steps before anything is timed."""


def build(layers: int, device: torch.device) -> Model:
    """The trained model with MXFP8 experts and its layers in turn, ``layers`` in all, each with weights of its own."""
    model = checkpoint.load_model(WEIGHTS, str(device))
    trained = list(model.layers)
    model.layers = torch.nn.ModuleList(copy.deepcopy(trained[i % len(trained)]) for i in range(layers))
    model.cfg = dataclasses.replace(model.cfg, num_hidden_layers=layers)
    return model


class Decoder:
    """Greedy decoding of B sequences, all of whose state is on the device."""

    def __init__(self, model: Model, batch: int, compile_with: str | None = None):
        device = model.rope.device
        self.model, self.cache = model, model.new_cache(batch)
        self.room = model.cfg.max_position_embeddings
        first = torch.arange(batch, dtype=torch.int64, device=device).unsqueeze(1)
        self.first = (ord("A") + first) % model.cfg.vocab_size
        """The token that each sequence begins with: the letters, then what follows them."""
        self.token = self.first.clone()
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.written = torch.zeros(self.room, batch, dtype=torch.int64, device=device)
        """The token at each position; what ``position`` has not reached means nothing."""
        self._advance = torch.compile(advance, fullgraph=True, backend=compile_with) if compile_with else advance

    def start(self) -> None:
        """From the beginning. The cache may hold anything from ``position`` on."""
        self.position.zero_()
        self.token.copy_(self.first)
        self.written[0] = self.first.squeeze(1)

    def step(self) -> None:
        """One token for every sequence. Reads nothing on the host."""
        self._advance(self.model, self.token, self.position, self.written, self.cache)


def advance(model: Model, token, position, written, cache) -> None:
    """token [B, 1] at position [1] -> the likeliest next ones, there and in written [S, B]; position moves on."""
    following = model(token, position, cache)[:, -1].argmax(-1)
    token.copy_(following.unsqueeze(1))
    position.add_(1)
    written.index_copy_(0, position, following.unsqueeze(0))


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class HostWork:
    """What a number of steps asked of PyTorch."""

    operations: int
    allocations: int | None
    """On the device; None where PyTorch does not count them (CPU)."""
    waits: str | None
    """The error of PyTorch's detector of synchronisations, if there was one."""

    def __str__(self) -> str:
        memory = "" if self.allocations is None else f"{self.allocations} allocations, "
        waits = "no wait for the device" if self.waits is None else f"A WAIT FOR THE DEVICE: {self.waits}"
        return f"{self.operations} operations, {memory}{waits}"


def host_work(step: Callable[[], object], count: int, device: torch.device) -> HostWork:
    """Of ``count`` steps, which have run before."""
    cuda, waits = device.type == "cuda", None
    allocations = lambda: torch.cuda.memory_stats(device)["allocation.all.allocated"] if cuda else 0
    before, mode = allocations(), torch.cuda.get_sync_debug_mode() if cuda else None
    with Operations() as operations:
        try:
            if cuda:
                torch.cuda.set_sync_debug_mode("error")
            for _ in range(count):
                step()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            waits = str(error)
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode(mode)
    return HostWork(operations.count, allocations() - before if cuda else None, waits)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to decode: a line of the CSV file."""

    device: str
    layers: int
    batch: int
    tokens: int
    """Steps."""
    way: str
    us: float
    """From one step to the next, many of them queued."""
    host_us: float | None
    """Of the host for one step on an idle device, median; None on a CPU, where the host is the device."""
    operations: int | None
    """For one step; None where they were not counted (inside a compiled step)."""

    HEADER = f"{'':<14} {'tokens/s':>10} {'us/token':>10} {'host us/token':>14} {'ops/token':>10}"

    def __str__(self) -> str:
        host = "" if self.host_us is None else f"{self.host_us:.1f}"
        operations = "" if self.operations is None else str(self.operations)
        return f"{self.way:<14} {self.batch / self.us * 1e6:>10.1f} {self.us:>10.1f} {host:>14} {operations:>10}"


def times(start: Callable[[], None], step: Callable[[], None], tokens: int, device: torch.device):
    """(microseconds from one step to the next, of the host for one on an idle device) of ``tokens`` steps."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start()
    synchronize()
    begin = time.perf_counter()
    for _ in range(tokens):
        step()
    synchronize()
    us = (time.perf_counter() - begin) * 1e6 / tokens
    if device.type != "cuda":
        return us, None
    start()
    host = []
    for _ in range(tokens):
        synchronize()
        begin = time.perf_counter()
        step()
        host.append((time.perf_counter() - begin) * 1e6)
    synchronize()
    return us, statistics.median(host)


def decode(start: Callable[[], None], step: Callable[[], None], decoder: Decoder, tokens: int) -> torch.Tensor:
    """The tokens that ``tokens`` steps write, with the first: [tokens + 1, B], on the CPU."""
    decoder.written.fill_(-1)
    start()
    for _ in range(tokens):
        step()
    return decoder.written[: tokens + 1].to("cpu", copy=True)


def passed(got: torch.Tensor, want: torch.Tensor, work: HostWork, least: HostWork) -> bool:
    """Prints what was checked: tokens [steps + 1, B] of replays and of the loop, and what as many replays of this graph
    and of the smallest one asked of PyTorch."""
    same = torch.equal(got, want)
    where = "" if same else f", from position {int((got != want).any(1).nonzero()[0])} on"
    print(f"tokens: {'those' if same else 'NOT those'} of the loop{where}")
    quiet = work == least and work.waits is None
    print(f"host: {'the replays alone' if quiet else 'MORE than the replays'}")
    print(f"  {len(got) - 1} replays: {work}\n  of the smallest graph: {least}", flush=True)
    return same and quiet


def bench(args, csv: report.Csv) -> bool:
    """Measures and prints; whether every check passed."""
    device = torch.device(args.device)
    progress("the model")
    model = build(args.layers, device)
    decoder = Decoder(model, args.batch, args.compile)
    cfg, experts = model.cfg, model.layers[0].block_sparse_moe.experts
    one = torch.ones(args.batch, cfg.num_experts_per_tok, device=device)
    hidden = torch.zeros(args.batch, cfg.hidden_size, dtype=torch.bfloat16, device=device)
    served = torch_mxfp8moe.explain(**experts.arguments(hidden, one, one.int())).backend
    progress("")
    print(f"{args.layers} layers of {cfg.num_local_experts} experts, {cfg.num_experts_per_tok} a token, hidden size "
          f"{cfg.hidden_size}, intermediate size {cfg.intermediate_size}; experts by backend '{served}'\n"
          f"sequences: {args.batch}, steps: {args.tokens}\n\n{Way.HEADER}", flush=True)  # fmt: skip

    def measured(name: str, step: Callable[[], None], operations: int | None) -> None:
        way = Way(args.device, args.layers, args.batch, args.tokens, name,
                  *times(decoder.start, step, args.tokens, device), operations)  # fmt: skip
        progress("")
        print(way, flush=True)
        csv.write([way])

    eager = "compiled" if args.compile else "eager"
    progress(f"{eager} loop")
    decode(decoder.start, decoder.step, decoder, min(WARM_UP, args.tokens))
    want = decode(decoder.start, decoder.step, decoder, args.tokens)
    decoder.start()
    count = None if args.compile else host_work(decoder.step, 1, device).operations
    measured(f"{eager} loop", decoder.step, count)
    if device.type == "cpu":
        print("\nno CUDA graphs on a CPU: nothing was captured, and the host computes every token itself")
        return True

    progress("capture")
    decoder.start()
    graph = timing.capture([decoder.step])
    number = torch.zeros((), device=device)
    smallest = timing.capture([lambda: number.add_(1)])
    got = decode(decoder.start, graph.replay, decoder, args.tokens)
    decoder.start()
    work, least = (host_work(one.replay, args.tokens, device) for one in (graph, smallest))
    measured("graph replays", graph.replay, work.operations // args.tokens)
    print()
    return passed(got, want, work, least)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"decoder layers (default {LAYERS})")
    parser.add_argument("--tokens", type=int, default=256, help="steps of each loop (default 256)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    machine.add_device(parser)
    parser.add_argument("--compile", nargs="?", const="inductor", choices=("inductor", "aot_eager"), metavar="BACKEND",
                        help="the step by torch.compile(fullgraph=True), inductor (the default) or aot_eager, which is "
                        "then what is captured")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there, each as soon as it is known")
    args = parser.parse_args(argv)
    cfg, _ = checkpoint.read_config(WEIGHTS)
    most = dict(layers=None, tokens=cfg.max_position_embeddings - 1, batch=cfg.vocab_size)
    for name, last in most.items():
        value = getattr(args, name)
        if value < 1 or last is not None and value > last:
            parser.error(f"--{name} is {value}; it takes 1 {'or more' if last is None else f'to {last}'}")
    machine.check_device(parser, args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    print(machine.described(args.device))
    with torch.inference_mode():
        return 0 if bench(args, report.Csv(args.csv, Way)) else 1


if __name__ == "__main__":
    sys.exit(main())
