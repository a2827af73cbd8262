"""Executes the gfx950 machine code that Triton emits, on the CPU, and checks what emulation alone does not see."""
