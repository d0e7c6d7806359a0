"""The command line `tokcompile`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tokcompile.cli.arguments import parse
from tokcompile.cli.show import emit
from tokcompile.errors import TokcompileError

FAILED, WRONG, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Terminated(SystemExit):
    """SIGTERM came."""


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """SIGTERM, which by default ends a process at once, raises Terminated: temporary files are removed on the way out."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    last = -1.0

    def stop(*_: Any) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if before < 0 or last - before > 1:  # timeout(1) sends it twice, and the second would break off the cleaning up
            raise Terminated(TERMINATED)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 where a check failed, 2 for what the user can mend."""
    args = parse(argv)
    try:
        # whatever a model or a library prints goes to stderr: stdout holds the result only
        with cleaning_up(), contextlib.redirect_stdout(sys.stderr if args.captures or args.json else sys.stdout):
            result = args.run(args)
        emit(result, args.json)
        return int(result.code)
    except TokcompileError as error:
        print(f"tokcompile {args.command}: error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"tokcompile {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print(f"tokcompile {args.command}: terminated", file=sys.stderr)
        return TERMINATED
