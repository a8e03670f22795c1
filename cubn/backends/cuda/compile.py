"""NVIDIA's run-time compiler, NVRTC: from a kernel's text to machine code of a device.

It is CuPy's binding that calls it, `cupy.cuda.nvrtc`, which needs no driver. The text is handed over as it is: CuPy's
own way would search for CUDA's headers, of which the kernels include none, and compile an empty text for every set of
options. See docs/decisions/0016-compiling-without-headers.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cubn.errors import BackendUnavailable

OPTIONS = ("-std=c++17", "-fmad=false")
"""The arithmetic would be the same without the second: every operation is written as one instruction."""

OLDEST = (12, 0)
"""Version of the oldest compiler that knows all that kernels are written in."""

INSTALL = (
    "Install one that is newer with: pip install --upgrade nvidia-cuda-nvrtc (or nvidia-cuda-nvrtc-cu12 for "
    "cupy-cuda12x)"
)


class Compiler(NamedTuple):
    """The compiler for one architecture."""

    nvrtc: Any  # a module like cupy.cuda.nvrtc
    version: tuple[int, int]
    architecture: int  # as 90

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]}"

    @property
    def options(self) -> tuple[str, ...]:
        return (*OPTIONS, f"-arch=sm_{self.architecture}")

    def cubin(self, kernel: str, source: str) -> bytes:
        """The machine code of a translation unit.

        Raises
        ------
        BackendUnavailable
            If it cannot be compiled.
        """
        program = self.nvrtc.createProgram(source, f"{kernel}.cu", (), ())
        try:
            self.nvrtc.compileProgram(program, self.options)
            return bytes(self.nvrtc.getCUBIN(program))
        except self.nvrtc.NVRTCError as error:
            log = str(self.nvrtc.getProgramLog(program)).splitlines()
            said = next((line for line in log if "error" in line), str(error))
            raise BackendUnavailable(
                f"cubn: {self} cannot compile the kernel {kernel} for sm_{self.architecture} ({said.strip()}). "
                f"{INSTALL}"
            ) from error
        finally:
            self.nvrtc.destroyProgram(program)


def compiler(nvrtc: Any, capability: tuple[int, int]) -> Compiler:
    """The compiler for devices of a compute capability; `nvrtc`: cupy.cuda.nvrtc.

    Raises
    ------
    BackendUnavailable
        Without the library, or with one that is too old for cubn or for the device.
    """
    try:
        version = nvrtc.getVersion()
    except Exception as error:  # of CuPy's own kinds, which differ between its versions
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendUnavailable(
            f"cubn: CUDA kernels are compiled by NVRTC, NVIDIA's run-time compiler, which CuPy cannot load ({said}). "
            "Install it with: pip install nvidia-cuda-nvrtc (or nvidia-cuda-nvrtc-cu12 for cupy-cuda12x)"
        ) from error
    named = "NVRTC {}.{}".format(*version)
    if version < OLDEST:
        raise BackendUnavailable(f"cubn: {named} is too old; {OLDEST[0]}.{OLDEST[1]} is needed. {INSTALL}")
    first = 10 * capability[0]
    known = sorted(nvrtc.getSupportedArchs())
    fitting = [found for found in (first + capability[1], first) if found in known]
    if not fitting:
        raise BackendUnavailable(
            f"cubn: {named} makes no code for compute capability {capability[0]}.{capability[1]}, only for "
            f"{', '.join(f'{found // 10}.{found % 10}' for found in known)}. {INSTALL}"
        )
    return Compiler(nvrtc, version, fitting[0])  # devices run what was made for the first of their generation
