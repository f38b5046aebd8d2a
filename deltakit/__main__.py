"""`deltakit` and `python -m deltakit`: the command line."""

import sys


def main() -> int:
    """Runs the command line of this process, and returns its exit code."""
    try:
        # Imported here: the command line takes 0.2 s to import, and Ctrl-C in that time is no traceback either.
        from deltakit import cli

        return cli.main()
    except KeyboardInterrupt:
        print("\ndeltakit: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
