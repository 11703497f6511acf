"""`distributed-rerank serve` from a checkout, as `ray job submit` runs it."""

import sys

from distributed_rerank.command_line import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
