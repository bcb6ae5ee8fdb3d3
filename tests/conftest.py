"""What holds for every test: one BLAS thread, and hypothesis without deadlines."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before numpy is imported anywhere: several ranks and threads share few cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shared machine may be slow at any moment; that says nothing about the code. In CI the examples are fixed, so that a
# red run means the change; elsewhere they are new each time, and a failure prints how to repeat it.
settings.register_profile(
    "parckpt",
    deadline=None,
    print_blob=True,
    derandomize="CI" in os.environ,
    database=None if "CI" in os.environ else settings.default.database,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("parckpt")
