"""Look at what `train.py` left: which rank saved how much, and whether two runs ended with the same weights.

    python examples/digits/report.py saved ckpts [log]
    python examples/digits/report.py compare ckpts other-ckpts

Needs neither MPI nor the ranks that saved.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import numpy as np

import parckpt


def saved(directory, log=None):
    """A line for each checkpoint, oldest first: its step, how long the save took, and the bytes in each rank's file."""
    text = Path(log).read_text() if log else ""
    seconds = {int(step): float(took) for step, took in re.findall(r"saved step (\d+) to .* GB in ([\d.]+) s", text)}
    print(f"{'step':>8}  {'saved by':<8}  {'bytes':>9}  {'in':>7}  {'speed':>10}   bytes of rank 0, 1, ...")
    for info in reversed(parckpt.list_checkpoints(directory)):
        files = [Path(info.path, f"rank_{rank}").iterdir() for rank in range(info.world_size)]
        sizes = "  ".join(f"{sum(file.stat().st_size for file in own):>9,}" for own in files)
        took = seconds.get(info.step, 0.0)
        speed = f"{took:>5.2f} s  {info.nbytes / took / 1e6:>5.1f} MB/s" if took else " " * 19
        print(f"{info.step:>8}  {info.world_size} ranks   {info.nbytes:>9,}  {speed}   {sizes}")


def checksums(directory):
    """Checksum of every full tensor and plain value of the newest checkpoint, whoever saved which part of it."""
    path = parckpt.latest_checkpoint(directory)
    if path is None:
        raise SystemExit(f"there is no checkpoint in {directory}")
    # Full tensors, put together from the ranks' files and verified. What belongs to single ranks (`name@rank_2`) cannot
    # be the same where the number of ranks is not.
    loaded = parckpt.load_checkpoint(path)
    return path, {name: checksum(value) for name, value in loaded.items() if "@rank_" not in name}


def checksum(value):
    """SHA-256 of an array's bytes, or of a plain value as Python spells it."""
    data = np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()


def compare(first, second):
    """Print the checksums of both side by side; exit status 1 if any differs."""
    (one, ones), (two, twos) = checksums(first), checksums(second)
    print(f"{one}\n{two}\n")
    print(f"{'name':<24} {'first':<18} {'second':<18}")
    differ = 0
    for name in sorted(ones.keys() | twos.keys()):
        left, right = ones.get(name, "missing"), twos.get(name, "missing")
        differ += left != right
        print(f"{name:<24} {left[:16]:<18} {right[:16]:<18} {'equal' if left == right else 'DIFFERENT'}")
    if differ:
        raise SystemExit(f"{differ} of {len(ones.keys() | twos.keys())} differ")
    print(f"\nall {len(ones)} are equal, bit for bit (SHA-256, 16 of its 64 digits shown)")


if __name__ == "__main__":
    commands = {"saved": saved, "compare": compare}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
