"""The exact columns of the tables between stages, by the table's name."""

import pyarrow as pa

SCHEMAS = {
    "candidates": pa.schema(
        {"query_id": pa.string(), "gallery_id": pa.string(), "rank": pa.int32(), "distance": pa.float32()}
    ),
    "pair_distances": pa.schema({"query_id": pa.string(), "gallery_id": pa.string(), "logit": pa.float32()}),
    "per_query": pa.schema(
        {
            "query_id": pa.string(),
            "label": pa.string(),
            "category": pa.string(),
            "n_relevant": pa.int64(),
            "first_hit_before": pa.int64(),
            "first_hit_after": pa.int64(),
        }
    ),
    "rejects": pa.schema({"id": pa.string(), "path": pa.string(), "stage": pa.string(), "reason": pa.string()}),
    "suspects": pa.schema(
        {
            "id": pa.string(),
            "other_id": pa.string(),
            "label": pa.string(),
            "other_label": pa.string(),
            "distance": pa.float32(),
            "own_distance": pa.float32(),
            "other_own_distance": pa.float32(),
            "kind": pa.string(),
            "precision": pa.float32(),
        }
    ),
}
MAY_BE_NULL = {"label", "category", "first_hit_before", "first_hit_after", "own_distance", "other_own_distance"}
"""Columns in which a cell may be empty."""
