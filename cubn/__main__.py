"""The command line: `python -m cubn info | demo | warm-up | diagnose`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

import cubn


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    parser = argparse.ArgumentParser(prog="cubn", description="Batch normalisation, one answer to the bit.")
    parser.add_argument("--version", action="version", version=f"cubn {cubn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends and why each is or is not available, threads, kernel cache")
    commands.add_parser("demo", help="train a small residual network on handwritten digits and check that bits agree")
    _add_warm_up(commands)
    _add_diagnose(commands)
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    try:
        if command == "warm-up":
            return _warm_up(commands.choices[command], options)
        if command == "diagnose":
            from cubn.cli.diagnose import diagnose

            return diagnose(commands.choices[command], **options)
        if command == "demo":
            from cubn.cli.demo import demo

            return demo()
        from cubn.cli.info import info

        print(info())
        sys.stdout.flush()
        return 0
    except (ImportError, cubn.BackendUnavailable) as error:  # what is missing, and how to get it
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads has read enough, `head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at exit
        return 141


OF_NETWORKS = {"batch": 32, "image": 224, "channels_last": False, "fuse": False, "device": "cpu", "architecture": None}
"""Options of `warm-up` that go with a network, and their defaults."""


def _add_warm_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from cubn.cli.networks import NETWORKS
    from cubn.cli.warm_up import DTYPES, FUSED, OPERATIONS, SHAPES

    parser = commands.add_parser(
        "warm-up",
        help="compile kernels ahead of their first use",
        description="Compile kernels ahead of their first use, and keep them in the kernel cache: those of a network's "
        "batch norms, or the CPU's for all usual calls. What is there already is not compiled again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("network", nargs="?", choices=tuple(NETWORKS), help="forward_train, backward and forward of it")
    several = {
        "layouts": (SHAPES, tuple(SHAPES), "where the channels are; without a network"),
        "dtypes": (DTYPES, ("float32",), "of the arrays"),
        "fused": (FUSED, ("plain", "relu", "residual-relu"), "what is done along with normalising; without a network"),
        "operations": (OPERATIONS, OPERATIONS, "which will be called; without a network"),
    }
    for name, (choices, default, meaning) in several.items():
        parser.add_argument(f"--{name}", nargs="+", choices=tuple(choices), default=default, help=meaning)
    many = "that compile for the CPU at once; 0: as many as there are cores"
    parser.add_argument("--processes", type=_natural, metavar="N", default=0, help=many)
    group = parser.add_argument_group("with a network")
    group.add_argument("--batch", type=_positive, metavar="N", help="images in a batch")
    group.add_argument("--image", type=_positive, metavar="N", help="positions along a side of an image")
    group.add_argument("--channels-last", action="store_true", help="neighbouring channels are neighbours in memory")
    group.add_argument("--fuse", action="store_true", help="residuals and ReLUs are part of the batch norms")
    group.add_argument("--device", type=_device, help="cpu, cuda or the like of cuda:1")
    elsewhere = "a CUDA device of this compute capability, which need not be here: 90 for 9.0"
    group.add_argument("--architecture", type=_positive, metavar="N", help=elsewhere)
    parser.set_defaults(**OF_NETWORKS)


def _add_diagnose(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "diagnose",
        help="what is wrong with the batch norms of checkpoint files",
        description="What is wrong with the batch norms of checkpoint files: of PyTorch, safetensors, NumPy, Flax, "
        "ONNX, Keras or Orbax, told by their content. Nothing in a file is run, and only batch norms are read.",
        epilog="exit status: 0 no more than infos, 1 a warning or an error, 2 a file that cannot be read",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint; a folder, if Orbax wrote it")
    parser.add_argument("--json", action="store_true", help="print JSON: of every file its report, or why it has none")
    parser.add_argument("--html", metavar="PATH", help="write a page with the report and figures; of one file")
    parser.add_argument("--figure", metavar="PATH", help="draw the running statistics; of one file, needs matplotlib")


def _warm_up(parser: argparse.ArgumentParser, options: dict[str, Any]) -> int:
    network, of_networks = options.pop("network"), {name: options.pop(name) for name in OF_NETWORKS}
    of_others = {name: options.pop(name) for name in ("layouts", "fused", "operations")}
    for name, value in (of_others if network else of_networks).items():
        if value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for a warm-up with{'out' * bool(network)} a network")
    if network is None:
        from cubn.cli.warm_up import warm_up

        return warm_up(**of_others, **options)
    from cubn.cli.warm_up_network import warm_up_network

    return warm_up_network(network, **of_networks, **options)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more; got {text}")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or the like of cuda:1; got {text}")
    return text


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more; got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
