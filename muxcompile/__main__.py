"""`python -m muxcompile` is the command `muxcompile`."""

from muxcompile.cli import main

if __name__ == "__main__":
    main()
