"""Item ids that open-metric-learning's exact search finds, for comparison. Runs in OML's environment.

    python _oml_ids.py OUT.npy

The embeddings are those that oml_peer.py times its search on: the same generator, seed and shapes.
"""

import json
import sys

import numpy as np
import torch
from oml.functional.knn import batched_knn_qg  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, 384, generator=generator) for n in (10_000, 50_000))
    labels = [torch.randint(0, 5_000, (n,), generator=generator) for n in (10_000, 50_000)]
    _, ids, _ = batched_knn_qg(queries, gallery, 100, labels_query=labels[0], labels_gallery=labels[1])
    np.save(sys.argv[1], np.stack([row.numpy() for row in ids]).astype(np.int32))
    print(json.dumps({"queries": len(ids)}))
