"""Whether the MPI library takes pointers to device memory: what can be asked, and what it answers.

A wrong yes is a segmentation fault, and a library's own query may be a constant of its compilation. So the answer is
yes only where at least one source says so and none says no. `python -m cubn.sync.cuda_aware` starts MPI and prints it.
"""

from __future__ import annotations

import ctypes

from mpi4py import MPI

VARIABLES = ("opal_cuda_support", "opal_built_with_cuda_support", "MPIR_CVAR_ENABLE_GPU")
"""Control variables of Open MPI and MPICH."""

_MPICH_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA


def evidence() -> dict[str, bool]:
    """What each source says that this library has."""
    library = ctypes.CDLL(MPI.__file__)  # its symbols are those of the MPI library it is linked with
    said: dict[str, bool] = {}
    if hasattr(library, "MPIX_Query_cuda_support"):
        said["MPIX_Query_cuda_support"] = bool(library.MPIX_Query_cuda_support())
    if hasattr(library, "MPIX_GPU_query_support"):
        supported = ctypes.c_int()
        failed = library.MPIX_GPU_query_support(_MPICH_CUDA, ctypes.byref(supported))
        said["MPIX_GPU_query_support"] = not failed and bool(supported.value)
    for name in VARIABLES:
        value = _control_variable(library, name)
        if value is not None:
            said[name] = value
    kinds = MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds")
    if kinds is not None:
        said["mpi_memory_alloc_kinds"] = any(kind.partition(":")[0] == "cuda" for kind in kinds.split(","))
    return said


def verdict(said: dict[str, bool]) -> tuple[bool, str]:
    """Whether device pointers may be passed, and why."""
    answers = ", ".join(f"{name} says {'yes' if yes else 'no'}" for name, yes in said.items())
    return bool(said) and all(said.values()), answers or "there is nothing to ask"


def _control_variable(library: ctypes.CDLL, name: str) -> bool | None:
    """An integer or boolean control variable of MPI's tools interface; None if there is none."""
    provided, index, count, value = (ctypes.c_int() for _ in range(4))
    handle = ctypes.c_void_p()
    if library.MPI_T_init_thread(0, ctypes.byref(provided)):
        return None
    try:
        if library.MPI_T_cvar_get_index(name.encode(), ctypes.byref(index)):
            return None
        if library.MPI_T_cvar_handle_alloc(index, None, ctypes.byref(handle), ctypes.byref(count)):
            return None
        failed = library.MPI_T_cvar_read(handle, ctypes.byref(value))
        library.MPI_T_cvar_handle_free(ctypes.byref(handle))
        return None if failed else bool(value.value & 0xFF)  # a boolean fills one byte only
    finally:
        library.MPI_T_finalize()


if __name__ == "__main__":
    aware, why = verdict(evidence())
    print(MPI.Get_library_version().strip("\0\n ").splitlines()[0])
    print(f"{'yes' if aware else 'no'}: {why}")
