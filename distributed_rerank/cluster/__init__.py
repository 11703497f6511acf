"""The same procedures on a Ray cluster, and on Ray processes of this machine; the only room that imports ray."""

import os

# Ray reads this when it is imported. Without it every line of a worker begins with colour codes and a process number,
# and not with its time.
os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")
