"""`python -m fedmerge`: the command line, from its very first moment.

It is not imported by any other module.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still being loaded is one line, too."""
    try:
        from fedmerge.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        print("fedmerge: stopped before anything was done", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
