"""cupy.cuda.nvrtc: the "machine code" is the text, for which cupy.cuda.function has a compiler."""

import pickle


class NVRTCError(RuntimeError):
    """As of CuPy."""


def getVersion():
    return 13, 0


def getSupportedArchs():
    return [75, 80, 86, 89, 90, 100, 120]


def createProgram(source, name, headers, include_names):
    return [source, ()]


def compileProgram(program, options):
    program[1] = tuple(options)


def getCUBIN(program):
    return pickle.dumps(program)


def getProgramLog(program):
    return ""


def destroyProgram(program):
    program.clear()
