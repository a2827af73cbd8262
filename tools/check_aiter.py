#!/usr/bin/env python
"""Hold an installed aiter against what this package takes it for; needs no GPU, but an aiter that imports.

    python tools/check_aiter.py              # interface, weight layouts of test/shapes.csv, tuned kernels
    python tools/check_aiter.py --overhead   # what a call costs the host beyond aiter's own time; needs no aiter

Exits with 1 if something does not fit, and with 77, saying why, if there is no aiter to hold against.
"""

import argparse
import inspect
import itertools
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

SKIPPED = 77
EXPERTS = 2
"""Of each shape whose layouts are compared: experts lie side by side."""
TOKENS = (1, 16, 64, 256, 2048, 16384)

VALUES = {"ActivationType.Silu": 0, "ActivationType.Swiglu": 2, "QuantType.per_1x32": 3}
"""aiter's enums as they were read (csrc/include/aiter_enum.h, v0.1.17 to v0.1.20): it hands the numbers to kernels."""


def check_interface() -> list[str]:
    """What does not fit of aiter's functions and enums."""
    import aiter_stand_in
    from torch_mxfp8moe.backends.aiter import probe

    aiter = probe.interface()
    wrong = [] if aiter.gate_mode == "interleave" else [f"GateMode.INTERLEAVE is {aiter.gate_mode!r}"]
    enums = {f"ActivationType.{name}": value for name, value in aiter.activations.items()}
    for name, value in (enums | {"QuantType.per_1x32": aiter.quant_type}).items():
        number = getattr(value, "value", value)
        if number != VALUES[name]:
            wrong.append(f"{name} is {number}, not {VALUES[name]}")
    parameters = inspect.signature(aiter.fused_moe).parameters
    known = aiter_stand_in.SIGNATURES["e4048607a5"]
    new = [name for name in parameters if f"{name}," not in f"{known}," and f"{name}=" not in known]
    for name in new:
        if parameters[name].default is inspect.Parameter.empty:
            wrong.append(f"fused_moe takes a new argument without a default, {name}")
    print(f"fused_moe takes {len(parameters)} arguments, {', '.join(new) or 'none'} unknown here")
    return wrong


def _same(name: str, got: torch.Tensor, want: torch.Tensor, where: torch.Tensor) -> list[str]:
    got, want = got.view(torch.uint8).flatten(), want.view(torch.uint8).flatten()
    if got.numel() != want.numel():
        return [f"{name}: {got.numel()} bytes, not {want.numel()}"]
    different = int(((got != want) & where.flatten()).sum())
    return [f"{name}: {different} of {want.numel()} bytes differ"] if different else []


def check_layouts(name: str, hidden: int, intermediate: int) -> list[str]:
    """What differs between aiter's own shuffles and ``preshuffle`` for experts of these sizes. aiter does not define
    the padding of w2's scales, which is left out."""
    from aiter.ops import shuffle

    import torch_mxfp8moe
    from torch_mxfp8moe.layouts import LAYOUTS, pad_intermediate

    layout = LAYOUTS["aiter_gfx950"]
    wrong = []
    for weight_name, gate_up in (("w1", True), ("w2", False)):
        shape = (EXPERTS, 2 * intermediate, hidden) if gate_up else (EXPERTS, hidden, intermediate)
        weight = torch.randint(256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale = torch.randint(255, (*shape[:2], shape[2] // 32), dtype=torch.uint8)
        pad_to = layout.intermediate_multiple
        ours = torch_mxfp8moe.preshuffle(weight, scale, layout=layout.name, gate_up=gate_up, pad_to=pad_to)
        weight, scale = pad_intermediate(weight, scale, gate_up, pad_to)
        their_weight = shuffle.shuffle_weight(weight, is_guinterleave=True, gate_up=gate_up)
        rows = scale.flatten(0, 1)
        if gate_up:
            their_scale = shuffle.shuffle_scale(rows, EXPERTS, is_guinterleave=True, gate_up=True)
        else:
            their_scale = shuffle.shuffle_scale(rows)
        defined = torch.ones_like(scale)
        if not gate_up:
            columns = layout.padded_scale_columns(weight.shape[2])
            defined = torch.nn.functional.pad(defined, (0, columns - defined.shape[2]))
            defined = layout.scale[gate_up].apply(defined).bool()
        else:
            defined = torch.ones(their_scale.numel(), dtype=torch.bool)
        everywhere = torch.ones(weight.numel(), dtype=torch.bool)
        wrong += _same(f"{name} {weight_name}", their_weight, ours[0], everywhere)
        wrong += _same(f"{name} {weight_name}_scale", their_scale, ours[1], defined)
    return wrong


def print_tuned(rows, units: int) -> None:
    """Which kernels each shape takes."""
    from torch_mxfp8moe.backends.aiter import tuned

    found = tuned.table(tuple(tuned.files()))
    print(f"\n{len(found)} tuned rows; on {units} compute units, - where aiter takes a rule of thumb:")
    for row in rows:
        padded = -(-row.intermediate // 128) * 128
        sizes = dict(hidden=row.hidden, intermediate=padded, experts=row.local, topk=row.topk)
        for tokens in TOKENS:
            kernels = tuned.lookup(found, units, tokens, **sizes)
            print(f"{row.name:<36} T={tokens:<6} {f'{kernels.stage1} {kernels.stage2}' if kernels else '-'}")


def check(units: int) -> int:
    from shapes import rows
    from torch_mxfp8moe.backends.aiter import probe
    from torch_mxfp8moe.layouts import LAYOUTS

    try:
        wrong = check_interface()
    except probe.Unusable as reason:
        print(f"SKIPPED, nothing was checked: {reason}", file=sys.stderr)
        return SKIPPED
    compared = []
    for row in rows().values():
        padded = -(-row.intermediate // 128) * 128
        if refusal := LAYOUTS["aiter_gfx950"].why_not(2 * padded, row.hidden, True):
            print(f"{row.name}: {refusal}")
            continue
        compared.append(row)
        wrong += check_layouts(row.name, row.hidden, row.intermediate)
    print(f"layouts of {len(compared)} shapes compared")
    print_tuned(compared, units)
    print(*(f"WRONG: {text}" for text in wrong), sep="\n")
    return int(bool(wrong))


CALLS, RUNS = 5000, 7
"""Of each thing that is measured."""


class _NoLaunch:
    """A compiled kernel that launches nothing."""

    run = None

    def __getitem__(self, grid):
        return lambda *arguments, stream: None


_libraries = []
"""What is registered, for as long as it is held."""


def _pretend_gfx950() -> None:
    """CPU tensors are served by aiter; kernels are not launched, all else is as on a GPU."""
    from triton.runtime import driver

    from torch_mxfp8moe import ops
    from torch_mxfp8moe.backends import aiter
    from torch_mxfp8moe.backends.triton import launch

    aiter.probe._check_machine = lambda: None
    aiter._architecture = lambda device: "gfx950"
    aiter.TRITON.why_unavailable = lambda: None
    aiter.TRITON.target = lambda device: "gfx950"
    launch.Launch.compiled = lambda self: _NoLaunch()
    driver.set_active(SimpleNamespace(get_current_stream=lambda device: 0))
    # CPU tensors would go to the C++ kernel, which those of a GPU do not.
    library = torch.library.Library(ops.NAMESPACE, "IMPL", "CPU")
    library.impl("fused_moe", ops._fused_moe, allow_override=True)
    _libraries.append(library)


def _empty_op(result: torch.Tensor):
    """An op with the schema of ``fused_moe`` whose Python kernel returns ``result``."""
    from torch_mxfp8moe import ops

    library = torch.library.Library("check_aiter", "DEF")
    library.define("nothing" + ops.SCHEMAS["fused_moe"])
    library.impl("nothing", torch.library.fallthrough_kernel, "Autograd")
    library.impl("nothing", lambda *args, **kwargs: result, "CompositeExplicitAutograd")
    _libraries.append(library)
    return torch.ops.check_aiter.nothing


def overhead() -> int:
    """Prints how long an eager call takes on the host, without what aiter would take."""
    import aiter_stand_in

    pretend = not torch.cuda.is_available()
    folder = tempfile.TemporaryDirectory()
    aiter_stand_in.install(Path(folder.name))
    sys.path.insert(0, folder.name)

    import torch_mxfp8moe
    from helpers import moe_inputs
    from torch_mxfp8moe import arguments
    from torch_mxfp8moe.arguments import FusedMoe
    from torch_mxfp8moe.backends import registered

    if pretend:
        _pretend_gfx950()
    status = torch_mxfp8moe.backends()["aiter"]
    if not status.usable:
        print(f"SKIPPED, nothing was measured: {status.reason}", file=sys.stderr)
        return SKIPPED
    device = "cpu" if pretend else "cuda"
    inputs = moe_inputs(64, 256, 128, E=8, K=4, G=16)
    inputs |= dict(expert_map=torch.arange(16, dtype=torch.int32) - 8, num_tokens=torch.tensor([64]).int())
    for name, gate_up in (("w1", True), ("w2", False)):
        inputs[name], inputs[f"{name}_scale"] = torch_mxfp8moe.preshuffle(
            inputs[name], inputs[f"{name}_scale"], layout="aiter_gfx950", gate_up=gate_up
        )
    inputs = {name: x.to(device) for name, x in inputs.items()}
    result = torch.empty(64, 256, dtype=torch.bfloat16, device=device)
    aiter_stand_in.behaviour = lambda arguments: result

    def median(call) -> float:
        """Microseconds."""
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            aiter_stand_in.calls.clear()
        return 1e6 * statistics.median(times)

    options = dict(**inputs, layout="aiter_gfx950", swiglu_limit=7.0)
    function, empty = torch.ops.mxfp8moe.fused_moe, _empty_op(result)
    with torch.inference_mode():
        function(**options)
        (given,) = aiter_stand_in.calls
        import aiter.fused_moe

        call, backend = FusedMoe(**options).check_once(), registered()["aiter"]
        routes, number = call.kind.plans["aiter"].routes, arguments._signature(call._tensors(call))
        memory = itertools.cycle(routes.of(call))

        def known(self, writes_out=False):
            self.kind = call.kind
            return self

        left_out = {
            "the tensors' number": mock.patch.object(arguments, "_signature", lambda tensors: number),
            "the kind of the call, with that number": mock.patch.object(FusedMoe, "check_once", known),
            "memory for ids, weights and mask": mock.patch.object(routes, "empty", lambda *what: next(memory)),
            "addresses and launch": mock.patch.object(routes.plan, "run_here", lambda *arguments: None),
        }
        runs = []
        for _ in range(RUNS):
            whole, own = median(lambda: function(**options)), median(lambda: aiter.fused_moe.fused_moe(**given))
            part, dispatcher = median(lambda: backend.new_fused_moe(call)), median(lambda: empty(**options))
            run = {"all": whole - own, "own": own, "backend": part - own, "op": whole - part, "dispatcher": dispatcher}
            for name, without in left_out.items():
                with without:
                    run[name] = whole - median(lambda: function(**options))
            runs.append(run)
    us = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    low, high = (limit(run["all"] for run in runs) for limit in (min, max))
    launched = "kernel not launched" if pretend else torch.cuda.get_device_name()
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, {launched}")
    print(f"us a call, medians of {CALLS} calls in {RUNS} runs: {us['all']:.1f} ({low:.1f} to {high:.1f}) "
          f"beyond the stand-in's {us['own']:.1f}")  # fmt: skip
    print(f"{us['backend']:6.1f}  the backend around it\n{us['op']:6.1f}  the op around both, as for any backend")
    print("of all, by leaving it out of a call:")
    print(f"{us['dispatcher']:6.1f}  PyTorch's dispatcher, as an op with these arguments that does nothing")
    for name in left_out:
        print(f"{us[name]:6.1f}  {name}")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overhead", action="store_true", help="measure the host's share of a call, with a stand-in")
    parser.add_argument("--units", type=int, default=256, help="compute units of the GPU in the tables (default 256)")
    args = parser.parse_args()
    sys.exit(overhead() if args.overhead else check(args.units))


if __name__ == "__main__":
    main()
