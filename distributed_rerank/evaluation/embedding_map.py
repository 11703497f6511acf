"""Where the queries lie among each other by their embeddings, and which of them find the right thing first."""

import numpy as np
import pandas as pd
import torch

from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.tensors.label_plane import label_plane

SHOWN_QUERIES = 1500
FEWEST_LABELS = 3


def embedding_map(ranked: Ranked, per_query: pd.DataFrame) -> pd.DataFrame | None:
    """`query_id`, `label`, `x`, `y`, `is_right` of at most `SHOWN_QUERIES` measured queries, spread over all of them.

    The embeddings are those that were searched. `is_right`: the final ranking has a relevant item in the first place.
    None without embeddings, and for fewer than `FEWEST_LABELS` labels.
    """
    embeddings = ranked.first.embeddings
    shown = per_query.iloc[np.unique(np.linspace(0, len(per_query) - 1, min(len(per_query), SHOWN_QUERIES), dtype=int))]
    if embeddings is None or shown["label"].nunique() < FEWEST_LABELS:
        return None
    catalogue = ranked.first.catalogue
    items = catalogue.items_of(shown["query_id"].tolist())
    vectors = embeddings.matrix[embeddings.rows_of(catalogue.ids)[items]]
    places = label_plane(torch.from_numpy(np.array(vectors)), torch.from_numpy(catalogue.labels[items]).long())
    side = "after" if ranked.after else "before"
    hit = shown[f"first_hit_{side}"].fillna(0).to_numpy()
    return shown[["query_id", "label"]].assign(x=places[:, 0].numpy(), y=places[:, 1].numpy(), is_right=hit == 1)
