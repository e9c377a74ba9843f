"""Test processes share the machine: one thread each, or they wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
