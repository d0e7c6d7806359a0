"""The command line `tokcompile`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from tokcompile.cli.arguments import parse
from tokcompile.cli.show import emit
from tokcompile.errors import TokcompileError

FAILED, WRONG, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 where a check failed, 2 for what the user can mend."""
    args = parse(argv)
    try:
        # whatever a model or a library prints goes to stderr: stdout holds the result only
        with contextlib.redirect_stdout(sys.stderr if args.captures or args.json else sys.stdout):
            result = args.run(args)
        emit(result, args.json)
        return int(result.code)
    except TokcompileError as error:
        print(f"tokcompile {args.command}: error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"tokcompile {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
