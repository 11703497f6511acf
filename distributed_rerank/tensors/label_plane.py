"""A plane to draw embeddings in: the two directions in which the means of labels differ most."""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor


def label_plane(
    embeddings: Float32[Tensor, "image dim"], labels: Int64[Tensor, " image"]
) -> Float32[Tensor, "image 2"]:
    """Each image's place in the plane of the first two principal axes of the labels' means, centred on their mean.

    The larger part of an axis is positive. Fewer than three labels, or dimensions, leave the second number 0.
    """
    names, members = labels.unique(return_inverse=True)
    sums = torch.zeros(len(names), embeddings.shape[1], dtype=torch.float64)
    sums.index_add_(0, members, embeddings.double())
    # [label, dim]: one row a label, however many images it has.
    means = sums / torch.bincount(members, minlength=len(names))[:, None]
    centre = means.mean(dim=0)
    # [axis, dim]: orthogonal, the one along which the means differ most first.
    axes = torch.linalg.svd(means - centre, full_matrices=False).Vh[: min(2, len(names) - 1)]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    places = (embeddings.double() - centre) @ (axes * largest.sign()).T
    return torch.nn.functional.pad(places, (0, 2 - places.shape[1])).float()
