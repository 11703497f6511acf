"""Rows of different lengths against loops over lists."""

import torch

from distributed_rerank.tensors.ragged import SparseRows, concatenate, offsets_of, places_in_rows, ranges, row_sums


def lengths_of(seed: int) -> list[int]:
    return torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_offsets_places_and_ranges_equal_loops_and_empty_rows_and_no_rows_work() -> None:
    for lengths in (lengths_of(0), [0, 0, 3, 0], [], [0]):
        starts = [7 * row for row in range(len(lengths))]
        of_lengths = torch.tensor(lengths, dtype=torch.int64)
        rows = torch.arange(len(lengths)).repeat_interleave(of_lengths)
        assert offsets_of(of_lengths).tolist() == [sum(lengths[:row]) for row in range(len(lengths) + 1)]
        assert places_in_rows(rows, of_lengths).tolist() == [i for n in lengths for i in range(n)]
        spans = ranges(torch.tensor(starts, dtype=torch.int64), of_lengths).tolist()
        assert spans == [start + i for start, n in zip(starts, lengths, strict=True) for i in range(n)]


def test_sparse_rows_concatenated_have_the_entries_and_sums_of_their_blocks() -> None:
    generator = torch.Generator().manual_seed(1)
    dense, blocks = [], []
    for seed in (0, 1):
        rows = [torch.randperm(9, generator=generator)[:n].sort().values for n in lengths_of(seed)]
        weights = [torch.rand(len(columns), generator=generator, dtype=torch.float64) for columns in rows]
        lengths = torch.tensor([len(columns) for columns in rows])
        blocks.append(SparseRows(offsets_of(lengths), torch.cat(rows), torch.cat(weights)))
        dense += [(c.tolist(), w.tolist()) for c, w in zip(rows, weights, strict=True)]
    whole = concatenate(blocks)
    wanted = torch.tensor([41, 3, 3, 59])
    lengths, entries = whole.entries_of(wanted)
    assert whole.columns[entries].tolist() == [column for row in wanted.tolist() for column in dense[row][0]]
    assert whole.weights[entries].tolist() == [weight for row in wanted.tolist() for weight in dense[row][1]]
    assert row_sums(whole.weights, whole.offsets.diff()).tolist() == [float(sum(weights)) for _, weights in dense]
    assert lengths.tolist() == [len(dense[row][0]) for row in wanted.tolist()]
