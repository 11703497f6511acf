"""The same procedures on a Ray cluster, and on Ray processes of this machine; the only room that imports ray."""

import os

# Ray reads both when it is imported. Without this every line of a worker begins with colour codes and a process number,
# and not with its time.
os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")
# Else lines that differ in their numbers alone, such as names of images, are dropped and counted behind another one.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
