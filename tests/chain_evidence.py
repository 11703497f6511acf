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
