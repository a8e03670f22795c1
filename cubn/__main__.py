"""The command line: `python -m cubn info | demo`."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    parser = argparse.ArgumentParser(prog="cubn", description="Batch normalisation, one answer to the bit.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends and why each is or is not available, threads, kernel cache")
    commands.add_parser("demo", help="train a small residual network on handwritten digits and check that bits agree")
    command = parser.parse_args(argv).command
    if command == "info":
        from cubn.info import info

        print(info())
        return 0
    from cubn.demo import demo

    return demo()


if __name__ == "__main__":
    sys.exit(main())
