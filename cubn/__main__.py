"""The command line: `python -m cubn info | demo | warm-up`."""

from __future__ import annotations

import argparse
import sys

import cubn


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    parser = argparse.ArgumentParser(prog="cubn", description="Batch normalisation, one answer to the bit.")
    parser.add_argument("--version", action="version", version=f"cubn {cubn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends and why each is or is not available, threads, kernel cache")
    commands.add_parser("demo", help="train a small residual network on handwritten digits and check that bits agree")
    _add_warm_up(commands)
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    try:
        if command == "warm-up":
            from cubn.cli.warm_up import warm_up

            return warm_up(**options)
        if command == "demo":
            from cubn.cli.demo import demo

            return demo()
    except ImportError as error:  # a package that is missing, and how to get it
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    from cubn.cli.info import info

    print(info())
    return 0


def _add_warm_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from cubn.cli.warm_up import DTYPES, FUSED, OPERATIONS, SHAPES

    parser = commands.add_parser(
        "warm-up",
        help="compile kernels ahead of their first use",
        description="Compile the CPU's kernels ahead of their first use, and keep them in the kernel cache. "
        "What is there already is not compiled again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    several = {
        "layouts": (SHAPES, tuple(SHAPES), "where the channels are"),
        "dtypes": (DTYPES, ("float32",), "of the arrays"),
        "fused": (FUSED, ("plain", "relu", "residual-relu"), "what is done along with normalising"),
        "operations": (OPERATIONS, OPERATIONS, "which will be called"),
    }
    for name, (choices, default, meaning) in several.items():
        parser.add_argument(f"--{name}", nargs="+", choices=tuple(choices), default=default, help=meaning)
    many = "that compile at once; 0: as many as there are cores"
    parser.add_argument("--processes", type=_natural, metavar="N", default=0, help=many)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more; got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
