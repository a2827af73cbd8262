"""What bench_gpu.py and tune_gpu.py measure with: ``timing``, the ``peers`` of fused_moe, and the ``report``."""
