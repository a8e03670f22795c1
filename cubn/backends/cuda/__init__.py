"""The CUDA backend: the kernels of `kernels/`, planned, specialised and launched."""
