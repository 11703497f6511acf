"""Cut work into blocks and share it among ranks: integers only, so that tests can try every case."""

from distributed_rerank.errors import BadInput


def blocks(n_items: int, block_size: int) -> list[tuple[int, int]]:
    """Cut 0..n_items into consecutive `(start, stop)` of `block_size`; only the last may be shorter.

    The cut depends on these two numbers alone, never on the number of workers. Workers take whole blocks, which is why
    any number of workers gives the same bits.

    >>> blocks(7, 3)
    [(0, 3), (3, 6), (6, 7)]

    Raises BadInput for a block size below 1 or a negative number of items.
    """
    if block_size < 1:
        raise BadInput(f"a block of {block_size} items holds nothing; choose a block size of at least 1")
    if n_items < 0:
        raise BadInput(f"{n_items} items cannot be cut into blocks; give a number of at least 0")
    return [(start, min(start + block_size, n_items)) for start in range(0, n_items, block_size)]


def tapering_blocks(n_items: int, block_size: int) -> list[tuple[int, int]]:
    """As `blocks`, but the last four whole blocks and the remainder are cut into blocks of a quarter of the size.

    Workers that take block after block then end at nearly the same time (guided self-scheduling, Polychronopoulos and
    Kuck 1987, with two sizes).

    >>> [stop - start for start, stop in tapering_blocks(59, 10)]
    [10, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1]

    Raises BadInput as `blocks`.
    """
    whole = blocks(n_items, block_size)[: max(0, n_items // block_size - 4)]
    done = len(whole) * block_size
    rest = blocks(n_items - done, -(-block_size // 4))
    return whole + [(done + start, done + stop) for start, stop in rest]


def rank_share(n_items: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous `(start, stop)` of 0..n_items that belongs to `rank` of `world_size`.

    The shares of all ranks, in rank order, are 0..n_items without gap or overlap. Their sizes differ by at most one;
    the first ranks have the longer ones.

    >>> [rank_share(7, rank, 3) for rank in range(3)]
    [(0, 3), (3, 5), (5, 7)]

    Raises BadInput for a rank outside 0..world_size-1 or a negative number of items.
    """
    if not 0 <= rank < world_size:
        raise BadInput(f"rank {rank} does not exist among {world_size} ranks; ranks are 0 to {world_size - 1}")
    if n_items < 0:
        raise BadInput(f"{n_items} items cannot be shared; give a number of at least 0")
    size, n_longer = divmod(n_items, world_size)
    start = rank * size + min(rank, n_longer)
    return start, start + size + (rank < n_longer)
