"""Groups of labels that the first stage takes for one another, such as the variants of one product.

The hardest negatives of a query have such labels. Where labels are drawn one by one, half of them holds only half of
these, so its lists are easier than those of the whole catalogue. And a model that was trained on the look-alikes of a
label knows more of that label than of a new one. So look-alikes stay on one side.
"""

import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.candidate_mining import are_negative


def look_alike_groups(lists: CandidateLists, labels: Int64[Tensor, " item"]) -> Int64[Tensor, " label"]:
    """The group of each label 0, 1, ...; a group's number is its smallest label.

    Each label is joined with the one that is nearest to its items: in each list the first candidate of another label
    counts k, the next one k - 1, and the label with the highest sum is joined, the smallest of equals. Labels that hang
    together by this are a group, three of them on average. A label is alone if its lists hold no other label and no
    label is joined with it. Items and candidates without a label (-1) do not count.
    """
    n_labels = int(labels.max()) + 1 if len(labels) else 0
    k = lists.items.shape[1]
    is_other = are_negative(lists, labels)
    # [query, k] labels of queries and candidates, and what a candidate of another label counts: k, k - 1, ... by place.
    own = labels[lists.query_items][:, None].expand(-1, k)
    other = labels[lists.items.clamp(min=0)]
    counts = k + 1 - is_other.cumsum(dim=1)
    # [pair] distinct pairs of labels, ascending, as one number each; [pair] the sum of what was counted.
    pairs, place = torch.unique((own * n_labels + other)[is_other], return_inverse=True)
    sums = torch.zeros(len(pairs), dtype=torch.int64).index_add_(0, place, counts[is_other])
    # The highest sums first, then the pairs by label, both stable: the first pair of each label is the one to join.
    by_sum = pairs[sums.argsort(descending=True, stable=True)]
    ordered = by_sum[(by_sum // n_labels).argsort(stable=True)]
    first, second = ordered // n_labels, ordered % n_labels
    is_first = torch.ones_like(first, dtype=torch.bool)
    is_first[1:] = first[1:] != first[:-1]
    return connected(first[is_first], second[is_first], n_labels)


def connected(first: Int64[Tensor, " pair"], second: Int64[Tensor, " pair"], n_nodes: int) -> Int64[Tensor, " node"]:
    """The smallest node that each of the nodes 0, 1, ... hangs together with by these pairs."""
    root = torch.arange(n_nodes)
    while True:
        # Both nodes of a pair, and then all that point at either of them, point at the smaller of the two roots.
        smaller = torch.minimum(root[first], root[second])
        joined = root.scatter_reduce(0, torch.cat([first, second]), torch.cat([smaller, smaller]), "amin")
        joined = torch.minimum(joined, joined[joined])
        if torch.equal(joined, root):
            return root
        root = joined
