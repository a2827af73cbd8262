"""The compiled part (``csrc/ops.cpp``), for type checkers."""

def capability() -> str:
    """The instruction set in use: 'avx512', 'avx2' or 'portable'."""

def capabilities() -> list[str]:
    """The instruction sets that this processor runs, the best first."""
