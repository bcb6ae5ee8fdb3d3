"""Runs a command and prints by how many bytes the highest resident set grew."""

import resource
import sys

from parckpt.cli.main import main


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


main(["--version"], standalone_mode=False)
before = peak()
main(sys.argv[1:], standalone_mode=False)
print("grew", peak() - before)
