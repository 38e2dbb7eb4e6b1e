"""`python -m runtime BUNDLE "prompt"`: pictures from the command line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from engines import EngineError
from engines.cli.interrupt import interruptible
from runtime.cli.draw import draw
from runtime.cli.options import parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m runtime") -> int:
    """Run the command line. Returns the exit status: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    args = parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    try:
        with interruptible():
            print(draw(args))
            return 0
    except KeyboardInterrupt:
        print("interrupted; nothing was left half written", file=sys.stderr)
        return 130
    except (EngineError, ValueError, OSError) as e:
        if args.verbose:
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
