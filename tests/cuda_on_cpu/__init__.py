"""Runs unmodified CUDA C++ kernels on the CPU: see README.md."""
