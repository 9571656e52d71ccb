"""Tests run side by side, a process a core: one thread each, also for the processes and notebooks that they start."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")
