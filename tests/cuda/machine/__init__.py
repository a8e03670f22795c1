"""NVIDIA's machine code, executed on the CPU: enough of compute capability 9.0 for cubn's kernels."""
