"""`python -m distributed_rerank` is the command `distributed-rerank`."""

from distributed_rerank.command_line import main

if __name__ == "__main__":
    main()
