"""``python -m persistrnn COMMAND``: each command is a module of its own, found by name."""

import importlib
import sys

COMMANDS = {
    "audit": "persistrnn.kernels.audit_table",
    "plan": "persistrnn.kernels.plan_command",
    "profile": "persistrnn.profiling.command",
    "report": "persistrnn.report",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        given = repr(sys.argv[1]) if len(sys.argv) > 1 else "nothing"
        print(
            f"usage: python -m persistrnn COMMAND ...\nCOMMAND must be one of: {', '.join(COMMANDS)}; got {given}. "
            "COMMAND --help tells more.",
            file=sys.stderr,
        )
        return 2
    module = COMMANDS[sys.argv.pop(1)]
    return importlib.import_module(module).main()


if __name__ == "__main__":
    sys.exit(main())
