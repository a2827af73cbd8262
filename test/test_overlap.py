"""Launches of a call that overlap (sm_90): which of them do, and by their code that each waits in time."""

import re
from functools import cache

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")
from torch_mxfp8moe.backends.triton import _interpreted  # noqa: E402

if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

from test_triton_compile import GPT_OSS, M3, SHAPES, moe  # noqa: E402
from torch_mxfp8moe.backends.triton import fused_moe  # noqa: E402
from torch_mxfp8moe.backends.triton.launch import compile_offline  # noqa: E402
from torch_mxfp8moe.backends.triton.targets import Target  # noqa: E402

WAIT, NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"

CALLS = {
    "route by route": dict(shape=M3, T=1),
    "route by route, local ones": dict(shape=M3, T=1, G=512, bias=True, scaled=True),
    "route by route on the vector units": dict(shape=M3, K=40, T=1),
    "few routes": dict(shape=M3, T=16),
    "one routing kernel": dict(shape=M3, T=150),
    "rounding beside routes": dict(shape=M3, T=300),
    "routes in parts": dict(shape=M3, T=3000, padded=True),
    "routes in parts, rows copied": dict(shape=M3, T=3000, layout="aiter_gfx950"),
    "MXFP8 tokens": dict(shape=M3, T=64, scaled=True),
    "biases, a tail in K": dict(shape=GPT_OSS, T=64),
    "bf16 activations": dict(shape=M3, T=64, activation_dtype="bf16"),
}


def launches(name: str, arch: str = "sm_90") -> list:
    """Of the call of that name, bound."""
    options = dict(CALLS[name])
    call = moe(**SHAPES[options.pop("shape")] | options)
    return fused_moe.plan(call, Target(arch)).bind(call.inputs | {"out": call.out}, call.device)


@cache
def kernels(name: str) -> list[tuple]:
    """Each launch, and its kernel compiled."""
    parts = launches(name)
    return list(zip(parts, compile_offline(parts, Target("sm_90"))))


def test_the_calls_have_all_kernels():
    found = {launch.kernel.__name__ for name in CALLS for launch in launches(name)}
    assert found == {
        "gate_up_kernel", "down_kernel", "gate_up_mma_kernel", "down_mma_kernel", "route_kernel", "dispatch_kernel",
        "route_round_kernel", "count_round_kernel", "count_kernel", "sum_kernel", "place_kernel",
        "warpgroup_gemm_kernel", "grouped_gemm_kernel", "combine_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_each_launch_but_the_first_is_dependent(name):
    parts = launches(name)
    assert [launch.dependent for launch in parts] == [False] + [True] * (len(parts) - 1)
    assert all(launch.arguments["OVERLAP"] is True for launch in parts)


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942", "gfx950"])
def test_elsewhere_none_is(arch):
    parts = [launch for name in CALLS for launch in launches(name, arch)]
    assert not any(launch.dependent or launch.arguments["OVERLAP"] for launch in parts)


def test_each_part_of_many_tokens_begins_with_a_launch_that_waits_for_all(monkeypatch):
    """The next part writes to the memory of the one before."""
    monkeypatch.setattr(fused_moe, "LARGEST_WORKSPACE", 1 << 22)
    names = [(launch.kernel.__name__, launch.dependent) for launch in launches("rounding beside routes")]
    first = [i for i, (_, dependent) in enumerate(names) if not dependent]
    assert len(first) > 1 and {names[i][0] for i in first} <= {"route_round_kernel", "dispatch_kernel"}
    assert all(names[i - 1][0] == "combine_kernel" for i in first[1:])


# What the code does before it waits


def blocks(ptx: str) -> list[tuple[list[str], list[int]]]:
    """The instructions of each block of a function, and which blocks may follow."""
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    parts, labels = [[]], {}
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if match := re.match(r"(\$\w+):", line):
            parts.append([])
            labels[match[1]] = len(parts) - 1
        elif line and not line.startswith("."):
            parts[-1].append(line)
            if re.search(r"\b(bra|ret|brx)\b", line):
                parts.append([])
    result = []
    for i, lines in enumerate(parts):
        last = lines[-1] if lines else ""
        to = [labels[name] for name in re.findall(r"\$\w+", last)] if re.search(r"\bbra\b", last) else []
        if not re.match(r"(bra|ret)\b", last) and i + 1 < len(parts):
            to.append(i + 1)
        result.append((lines, to))
    return result


def reached_without(ptx: str, stop: str) -> str:
    """All instructions that are met on some way on which ``stop`` is not met before."""
    flow, found, todo, known = blocks(ptx), [], [0], {0}
    while todo:
        lines, to = flow[todo.pop()]
        for line in lines:
            if stop in line:
                break
            found.append(line)
        else:
            todo += [i for i in to if i not in known]
            known |= set(to)
    return "\n".join(found)


WRITES = r"\bst\.global|\bred\.|\batom\.|\bst\.async|bulk\S*\.global\.shared"


def test_the_walk_finds_what_is_before_a_wait():
    lines = """.visible .entry f(.param .u64 p)
    {
    setp.ne.b32 %p1, %r1, 0;
    @%p1 bra $L_1;
    griddepcontrol.wait; // $0
    st.global.b32 [%rd1], %r1;
    $L_1:
    %s
    ret;
    }"""
    assert not re.search(WRITES, reached_without(lines.replace("%s", ""), WAIT))
    assert re.search(WRITES, reached_without(lines.replace("%s", "st.global.b32 [%rd1], %r2;"), WAIT))
    assert "ret;" in reached_without(lines, WAIT)
    assert "ret;" not in reached_without(lines.replace("@%p1 bra $L_1;", ""), WAIT)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_written_and_no_program_ends_before_it_waits(name):
    """A program that ended without having waited would let its launch end before the one before it."""
    for launch, kernel in kernels(name):
        ptx, which = kernel.asm["ptx"], launch.kernel.__name__
        assert bool(kernel.metadata.launch_pdl) == launch.dependent, which
        assert ptx.count(WAIT) == 1, which
        before = reached_without(ptx, WAIT)
        assert NEXT not in before, which
        if which != "warpgroup_gemm_kernel":  # of which one warp waits, and tells the others
            assert not re.search(WRITES, before), f"{which}: {re.search(WRITES, before)}"
            assert not re.search(r"^ret;", before, re.M), which
        assert ptx.count(NEXT) == (which not in ("down_kernel", "down_mma_kernel", "combine_kernel")), which


GIVEN = {
    "x", "x_scale", "w", "w_scale", "bias", "topk_ids", "expert_map", "num_tokens", "topk_weights", "out",
}  # fmt: skip
"""Tensors of the call, which its launches do not write, or not before the last one."""


def before_the_wait(text: str) -> tuple[set[str], set[str]]:
    """Of a kernel in Triton's IR, the arguments that what is read from global memory may come from, before the wait and
    after it; of the warps that wait, and of an address, not of what decides where in it."""
    names = {f"%{name}": {name} for name in re.findall(r"%(\w+): !tt\.(?:ptr|tensordesc)", text)}
    given = re.search(r"ttg\.warp_specialize\((.*?)\)", text)
    for start in re.finditer(r"partition\d+\(", text):
        inner = re.findall(r"(%arg\d+): ", text[start.end() : text.index("num_warps", start.end())])
        names |= {own: names.get(outer, set()) for own, outer in zip(inner, given[1].split(", "))}
    begin = max((start.end() for start in re.finditer(r"partition\d+\(", text[: text.index(WAIT)])), default=0)
    found = set(), set()
    for line in text[begin:].splitlines():
        if WAIT in line:
            found = found[0] | found[1], set()
        for inner, outer in re.findall(r"(%\w+) = (%[\w#]+)", line):  # of a loop
            names[inner] = names.get(inner, set()) | names.get(outer, set())
        result, right = (re.match(r"\s*(?:(%\w+)(?::\d+)? = )?(.*)", line.split(" loc(")[0])).groups()
        operands = re.findall(r"%\w+", right)
        if right.startswith("tt.elementwise_inline_asm"):
            operands = re.findall(r"%\w+", right[right.index(" {constraints") :])
        if re.match(
            r"tt\.load|ttng\.async_tma_copy_global_to_local|tt\.descriptor_load|ttg\.async_copy_global"
            r'|tt\.elementwise_inline_asm "[^"]*\bld\.global',
            right,
        ):
            found[1].update(names.get(operands[0], set()))
        elif result:
            names[result] = names.get(result, set()).union(*(names.get(one, set()) for one in operands))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_what_the_launch_before_writes_is_read_after_the_wait(name):
    """By the order of Triton's own code, before it is compiled: no loads move over an instruction that may write."""
    for launch, kernel in kernels(name):
        which, up = launch.kernel.__name__, launch.arguments.get("GATE_UP")
        early, late = before_the_wait(kernel.asm["ttir" if "ttir" in kernel.asm else "ttgir"])  # Gluon has no ttir
        own = GIVEN - {"x"} if up is not None else GIVEN  # a product's x was written by another launch
        assert late - own or not launch.dependent, which
        if which == "warpgroup_gemm_kernel" and not up:
            # Which tiles there are was written before the first product, which has waited for that.
            own = own | {"tiles", "offsets"}
            assert "w" in early and "x" in late
        if which in ("down_kernel", "down_mma_kernel"):
            assert "w" in early and "inner" in late
        assert early <= own, f"{which} reads {early - own} before it waits"
