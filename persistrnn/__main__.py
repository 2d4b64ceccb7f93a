"""``persistrnn COMMAND``, or ``python -m persistrnn COMMAND``: each command is a module of its own, found by name."""

import argparse
import importlib
import sys

from persistrnn import __version__

COMMANDS = {
    "plan": (
        "persistrnn.kernels.inspect.plan_command",
        "what the kernels would do for one layer on one device, predicted",
    ),
    "audit": (
        "persistrnn.kernels.inspect.audit_command",
        "prove from compiled code where the kernels keep the weights; no GPU",
    ),
    "profile": ("persistrnn.profiling.command", "measure where time and memory of training go, as a page with advice"),
}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="persistrnn",
        description="LSTM and GRU layers for PyTorch on persistent Triton kernels: what they would do, do and did.",
        epilog="persistrnn COMMAND --help tells more.",
        allow_abbrev=False,
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = result.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    return result


def main() -> int:
    given = sys.argv[1:]
    if not given:
        parser().print_help(sys.stderr)
        return 2
    # A command reads its own arguments; its module is imported for it alone.
    command = parser().parse_args(given[:1]).command
    status: int = importlib.import_module(COMMANDS[command][0]).main(given[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
