"""Planted evidence for a choice: points around label centres, with logits of a known worth."""

import torch

from distributed_rerank.chain.evidence import Evidence
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.metrics import count_relevant

N_LABELS, N_IMAGES = 30, 5


def evidence(spread: float, logit_noise: float | None, is_shuffled: bool = False, seed: int = 0) -> Evidence:
    """Points around label centres; logits tell the truth but for noise, or are noise alone (None)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N_LABELS).repeat_interleave(N_IMAGES)
    centres = torch.randn(N_LABELS, 16, generator=generator)
    embeddings = centres[labels] + spread * torch.randn(len(labels), 16, generator=generator)
    items = torch.arange(len(labels))
    lists = nearest(embeddings, embeddings, query_items=items, gallery_items=items, n_items=30)
    if is_shuffled:
        labels = labels[torch.randperm(len(labels), generator=generator)]
    truth = (labels[lists.items] != labels[:, None]).float()
    noise = torch.randn(truth.shape, generator=generator)
    logits = noise if logit_noise is None else 4 * truth + logit_noise * noise
    n_relevant = count_relevant(items, labels, None, items, labels, None)
    return Evidence(lists, labels, n_relevant, logits, embeddings)


def evidence_beside_seen(truth_weight: float, noise: float, seed: int = 0) -> Evidence:
    """As many points again that the extractor has seen, in tight groups between the others; only these are told apart.

    The logits are the distances of the first stage, but seen candidates are sent behind all others; `truth_weight` is
    what they know of the matches, `noise` how far they stray.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N_LABELS).repeat_interleave(N_IMAGES)
    centres = torch.randn(N_LABELS, 16, generator=generator)
    near = centres + 0.5 * torch.randn(N_LABELS, 16, generator=generator)
    x = torch.cat([centres[labels], near[labels]])
    x += torch.cat([torch.full((len(labels), 1), 0.8), torch.full((len(labels), 1), 0.05)]) * torch.randn(
        x.shape, generator=generator
    )
    is_seen = torch.arange(len(x)) >= len(labels)
    labels = torch.cat([labels, torch.full_like(labels, -1)])
    items = torch.arange(len(x))
    lists = nearest(x, x, query_items=items, gallery_items=items, n_items=60)
    is_match = labels[lists.items] == labels[:, None]
    strays = torch.randn(is_match.shape, generator=generator)
    # A logit is larger for pairs that do not match, as a distance is.
    logits = lists.distances + 100 * is_seen[lists.items].float() - truth_weight * is_match.float() + noise * strays
    n_relevant = count_relevant(items, labels, None, items, labels, None)
    return Evidence(lists, labels, n_relevant, logits.float(), x, is_seen=is_seen)
