"""``python -m parckpt.cli``: the same as the console script."""

from parckpt.cli.main import main

if __name__ == "__main__":
    main(prog_name="parckpt")
