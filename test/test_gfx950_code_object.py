"""ELF code objects, as the gfx950 simulator reads and executes them. That those of the package's kernels are what their
text says is in test_gfx950_gates.py."""

import re
import types

import pytest
import torch
from helpers import only_cpu

from torch_mxfp8moe.backends.triton import _interpreted

pytest.importorskip("triton", reason="needs Triton: pip install triton")
pytest.importorskip("numpy", "2.0")
if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

import gfx950_kernels as kernels  # noqa: E402
from gfx950_simulator import code_object, launch  # noqa: E402
from gfx950_simulator.assembly import AssemblyError, parse  # noqa: E402
from gfx950_simulator.machine import Program, SimulationError  # noqa: E402

pytestmark = [
    only_cpu,
    pytest.mark.skipif(code_object.missing() is not None, reason=str(code_object.missing())),
]


@pytest.fixture(scope="module")
def add():
    """x + y."""
    return kernels.compile_text(kernels.add_kernel, dict(x="*fp32", y="*fp32", out="*fp32", n="i32"), dict(BLOCK=256))


@pytest.fixture(scope="module")
def scaled_dot():
    types = dict(a="*fp8e4nv", a_scale="*u8", b="*fp8e4nv", b_scale="*u8", out="*fp32")
    return kernels.compile_text(kernels.dot_scaled_kernel, types, dict(K=512, M=32, N=32, BLOCK_K=128))


def changed(compiled, name: str, word: int, change: int) -> bytes:
    """Its code object, but for ``change`` (xor) in 32-bit word ``word`` of the first instruction that is called
    ``name`` and something."""
    data = compiled.asm["hsaco"]
    elf, code = code_object.Elf(data), code_object.read(data)
    place = next(int(one.place.split()[1], 0) for one in code.instructions if one.name.startswith(name))
    at = data.index(elf.at(*elf.symbols()[code.name])) + place + 4 * word
    new = int.from_bytes(data[at : at + 4], "little") ^ change
    return data[:at] + new.to_bytes(4, "little") + data[at + 4 :]


def with_code_object(compiled, data: bytes):
    """As Triton's CompiledKernel, as far as the simulator looks."""
    return types.SimpleNamespace(src=compiled.src, metadata=compiled.metadata, asm=compiled.asm | dict(hsaco=data))


def test_the_code_object_is_what_is_executed(add):
    """With v_sub_f32 in place of v_add_f32, opcode 2 for 1, in the code object alone."""
    subtract = with_code_object(add, changed(add, "v_add_f32", 0, 3 << 25))
    x, y = torch.arange(300.0), torch.full((300,), 0.5)
    for compiled, want in ((add, x + y), (subtract, x - y)):
        out = torch.empty(300)
        kernels.run(launch.Kernel.of(compiled), dict(x=x, y=y, out=out, n=300), (2,), ["out"])
        assert torch.equal(out, want)


def test_without_a_disassembler_the_text_is_executed_with_a_warning(add, monkeypatch):
    monkeypatch.setattr(code_object, "missing", lambda: "none is there")
    with pytest.warns(UserWarning, match="assembly text is executed and not the code object: none is there"):
        kernel = launch.Kernel.of(with_code_object(add, b""))
    assert kernel.program.instructions[0].place.startswith("line ")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(code_object, "PACKAGE", "mxfp8moe-no-such-package")
    with pytest.raises(code_object.NoDisassembler, match="pip install mxfp8moe-no-such-package"):
        code_object._library.__wrapped__()


def test_errors_name_the_byte(add):
    x = torch.zeros(256)
    with pytest.raises(SimulationError, match=r"byte 0x[0-9a-f]+: global_load_dword .*: load of 4 bytes outside"):
        kernels.run(launch.Kernel.of(add), dict(x=x, y=x, out=torch.empty(300), n=300), (2,), ["out"])


# --- beside the text


@pytest.mark.parametrize("which", ["add", "scaled_dot"])
def test_it_is_the_text(which, request):
    compiled = request.getfixturevalue(which)
    code, text = code_object.read(compiled.asm["hsaco"]), parse(compiled.asm["amdgcn"])
    assert code.preload_entry is not None and code.threads == 256 and code.metadata["vgpr_count"] > 0
    assert code_object.differences(code, text) == []


@pytest.mark.parametrize(
    "name, word, change, found",
    [
        ("v_mfma_scale_f32_32x32x64_f8f6f4", 0, 1 << 11, "op_sel:.* is not line"),
        ("v_mfma_scale_f32_32x32x64_f8f6f4", 3, 1 << 9, "v_mfma_scale.* is not line"),  # a register
        ("ds_read", 1, 1, "ds_read.* is not line"),
        ("s_waitcnt", 0, 1, r"s_waitcnt vmcnt.* is not line"),
        ("s_barrier", 0, 0xA << 16, "s_nop 0 is not line .*s_barrier"),
        ("s_cbranch_scc1", 0, 1 << 16, "s_cbranch_scc0 .* is not line .*s_cbranch_scc1"),
    ],
)
def test_a_changed_bit_is_a_difference(scaled_dot, name, word, change, found):
    code = code_object.read(changed(scaled_dot, name, word, change))
    (difference,) = code_object.differences(code, parse(scaled_dot.asm["amdgcn"]))
    assert re.search(found, difference), difference


@pytest.mark.parametrize(
    "word, replacement, found",
    [
        ("amdhsa_next_free_vgpr ", "amdhsa_next_free_vgpr 9", "next_free_vgpr 8 is not"),
        ("amdhsa_accum_offset ", "amdhsa_accum_offset 6", "accum_offset .* is not 6"),
        ("amdhsa_kernarg_size ", "amdhsa_kernarg_size 9", "kernarg_size .* is not 9"),
        ("amdhsa_float_denorm_mode_32 3", "amdhsa_float_denorm_mode_32 0", "float_denorm_mode_32 3 is not 0"),
        (".vgpr_spill_count: 0", ".vgpr_spill_count: 7", "vgpr_spill_count 0 is not 7"),
        (".value_kind:     by_value", ".value_kind:     global_buffer", "other arguments"),
        ("s_endpgm\n", "s_endpgm\n\ts_endpgm\n", "are not"),
    ],
)
def test_another_text_is_a_difference(add, word, replacement, found):
    text = add.asm["amdgcn"]
    assert word in text
    differences = code_object.differences(code_object.read(add.asm["hsaco"]), parse(text.replace(word, replacement)))
    assert any(re.search(found, one) for one in differences), differences


# --- what it does not take


def test_a_branch_to_where_no_instruction_is(scaled_dot):
    with pytest.raises(AssemblyError, match=r"s_cbranch_\w+ \S+: no instruction begins there"):
        code_object.read(changed(scaled_dot, "s_cbranch_", 0, 1 << 14))


def test_what_is_no_code_object(add):
    data = add.asm["hsaco"]
    for other, message in (
        (b"", "no 64-bit little-endian ELF file"),
        (data[:3000], "the ELF file ends at byte 3000"),
        (data[:18] + b"\x3e\0" + data[20:], "another architecture: machine 62"),
        (data[:48] + b"\x4c" + data[49:], "another architecture: machine 224, flags 0x.*4c"),
        (data.replace(b"add_kernel.kd", b"add_kernel.ke"), "0 kernels, not one"),
    ):
        with pytest.raises(AssemblyError, match=message):
            code_object.read(other)


def test_bytes_that_are_no_instruction():
    nop, load = bytes.fromhex("000080bf"), bytes.fromhex("020300c000000000")
    assert [at for at, _ in code_object.disassemble(nop + load + nop)] == [0, 4, 12]
    with pytest.raises(AssemblyError, match="byte 0x4: ffffffff is no instruction"):
        code_object.disassemble(nop + b"\xff" * 4)


@pytest.mark.parametrize(
    "data, value",
    [
        ("7f", 127), ("cc80", 128), ("cd0102", 0x102), ("ce00010000", 65536), ("cf0000000100000000", 2**32),
        ("d0ff", -1), ("d3ffffffffffffffff", -1), ("c2", False), ("c3", True), ("a26162", "ab"), ("d9026162", "ab"),
        ("da00026162", "ab"), ("9201a0", [1, ""]), ("dc000105", [5]), ("81a16101", {"a": 1}),
        ("de0001a161c3", {"a": True}), ("82a16191a162a163810203", {"a": ["b"], "c": {2: 3}}),
    ],
)  # fmt: skip
def test_messages(data, value):
    """The encodings that MessagePack's specification gives."""
    data = bytes.fromhex(data)
    found = code_object.message(data + b"\xff", 0)
    assert found == (value, len(data)) and type(found[0]) is type(value)


def test_registers_that_the_kernel_does_not_have(add):
    text = add.asm["amdgcn"].replace("v_add_f32_e32 v2, v4, v2", "v_add_f32_e32 v2, v40, v2")
    with pytest.raises(SimulationError, match=r"v_add_f32_e32 v2, v40, v2: v40 is beyond the \d+ VGPRs and 0 AGPRs"):
        Program(parse(text))
