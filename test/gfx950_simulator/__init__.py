"""Executes the gfx950 machine code that Triton emits, on the CPU, and checks what emulation alone does not see.

It takes the ELF code object of a compiled kernel, or assembly text, arguments as tensors, and a grid, and runs every
workgroup: numpy arrays hold the registers of all waves, and one function executes one instruction for all waves that
are at it. To read it:

- ``assembly``: text -> instructions, kernel descriptor, argument layout; ``code_object``: the same out of an ELF file
- ``operands``: what an operand gives, and the table that maps a mnemonic to the function that builds its execution
- ``vector``, ``scalar``, ``matrix``, ``memory_access``: the table's entries; ``formats``: fp8 by table
- ``decode``: fills an instruction in: what it does, its unit, the registers that it reads and writes
- ``memory``: bytes that know whether a kernel may touch them and whether they were written
- ``machine``: a launch's state and the loop that executes it; observers see what happens
- ``checks``: observers: undefined values, s_waitcnt, order of waves in LDS; ``hazards``: wait states, without a run
- ``launch``: Triton's and the package's launches on tensors

``launch.simulate(launches, target, inputs)`` runs a list of the package's launches; ``Kernel.of`` and
``Device.launch`` run one kernel of any origin. Errors name the instruction with its place, the wave and the lane.

Not modelled: time; the order of sums and the rounding inside the matrix unit; the last bit of transcendental
functions; workgroups that run at the same time and communicate through global memory; caches and memory scopes; traps,
modes other than IEEE with denormals; 6-bit formats, float64 matrix instructions, structured buffers. An instruction
that is not in the table is an error.

The sources are AMD's "CDNA4 Instruction Set Architecture" reference guide, LLVM's "User Guide for AMDGPU Backend" and
Triton's definitions of layouts, as the modules say. Chapters are cited by the numbers that they have in the guide of
CDNA3, whose order CDNA4's follows; numbers of wait states are LLVM's, which implements the guide's tables. What makes
the reading of all this credible is that Triton's code, which runs on the hardware, gives right results here, and
that small changes to it or to the semantics do not (test_gfx950_mutations.py).
"""
