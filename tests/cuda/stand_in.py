"""What the backend uses of cupy.cuda to compile and load kernels, without CuPy, a compiler or a driver."""

import ctypes
import hashlib
import itertools
import threading
from types import SimpleNamespace

from tests.cuda import nvrtc


class NVRTCError(RuntimeError):
    """As CuPy has it."""


class CUDADriverError(RuntimeError):
    """As CuPy has it."""


class Nvrtc:
    """`cupy.cuda.nvrtc`. Its machine code is the text and options in short; what has an `#error` does not compile."""

    NVRTCError = NVRTCError

    def __init__(self, version=(13, 1), architectures=(75, 80, 86, 89, 90, 100, 103, 110, 120, 121)):
        self.version = version
        self.architectures = architectures
        self.compiled = []
        """Names of programs, as compiling them begins."""
        self.open = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def getVersion(self):
        return self.version

    def getSupportedArchs(self):
        return self.architectures

    def createProgram(self, source, name, headers, include_names):
        assert not headers and not include_names
        with self._lock:
            program = next(self._numbers)
            self.open[program] = [name, source, b"", ""]
        return program

    def compileProgram(self, program, options):
        name, source, _, _ = found = self.open[program]
        with self._lock:
            self.compiled.append(name.removesuffix(".cu"))
        self.while_compiling()
        if "#error" in source:
            found[3] = f"{name}(1): warning: so\n{name}(1): error: #error directive\n1 error detected"
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")
        found[2] = hashlib.sha256("\n".join([source, *options]).encode()).digest()

    def while_compiling(self):
        """For a test to wait in."""

    def getCUBIN(self, program):
        return self.open[program][2]

    def getProgramLog(self, program):
        return self.open[program][3]

    def destroyProgram(self, program):
        del self.open[program]


class RealNvrtc(Nvrtc):
    """NVIDIA's, by ctypes, where it is installed; FileNotFoundError where it is not."""

    def __init__(self, cuda=13):
        self._library = nvrtc.library(cuda)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        super().__init__((major.value, minor.value), tuple(nvrtc.architectures(cuda)))

    def createProgram(self, source, name, headers, include_names):
        assert not headers and not include_names
        program = ctypes.c_void_p()
        self._check("CreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        return program

    def compileProgram(self, program, options):
        given = [option.encode() for option in options]
        self._check("CompileProgram", program, len(given), (ctypes.c_char_p * len(given))(*given))

    def getCUBIN(self, program):
        return nvrtc._bytes(self._library, program, "CUBIN")

    def getProgramLog(self, program):
        return nvrtc._bytes(self._library, program, "ProgramLog")[:-1].decode()

    def destroyProgram(self, program):
        self._check("DestroyProgram", ctypes.byref(program))

    def _check(self, function, *arguments):
        if status := getattr(self._library, f"nvrtc{function}")(*arguments):
            raise NVRTCError(f"NVRTC_ERROR ({status})")


class Cuda:
    """`cupy.cuda`, with a driver that says `refusal` of machine code that it is to load, if anything."""

    def __init__(self, refusal=""):
        self.loaded = []
        self.attributes = {}
        cuda = self

        class Module:
            def load(self, code):
                if refusal:
                    raise CUDADriverError(refusal)
                cuda.loaded.append(code)

            def get_function(self, name):
                return SimpleNamespace(name=name, ptr=7)

        self.function = SimpleNamespace(Module=Module)
        self.driver = SimpleNamespace(
            CUDADriverError=CUDADriverError,
            CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=1,
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
            funcGetAttribute=lambda attribute, function: {(1, 7): 512}[attribute, function],
            funcSetAttribute=lambda function, attribute, value: self.attributes.update({(function, attribute): value}),
        )
