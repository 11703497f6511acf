"""Which queries are shown: who gained, who lost, who was never right."""

import pandas as pd
from report_examples import made_up_queries

from distributed_rerank.report import choose_queries


def test_choose_queries_orders_by_gain_of_reciprocal_rank_then_by_id() -> None:
    # b and c gain 1/2, a loses 1/2, d is found, e is never right, f always is, g leaves the list
    table = pd.DataFrame(
        {
            "query_id": list("cbadefg"),
            "first_hit_before": pd.array([2, 2, 1, None, 3, 1, 5], dtype="Int64"),
            "first_hit_after": pd.array([1, 1, 2, 4, 3, 1, None], dtype="Int64"),
            "map@10_after": 0.0,
        }
    )
    assert choose_queries(table, 2) == (["b", "c"], ["a", "g"], ["d", "e"])
    assert choose_queries(table, 9) == (["b", "c", "d"], ["a", "g"], ["e"])


def test_choose_queries_first_stage_alone_has_only_missed_ones() -> None:
    table = made_up_queries(30).drop(columns=["first_hit_after", "cmc@1_after", "map@10_after"])
    chosen = choose_queries(table, 3)
    assert not chosen.improved
    assert not chosen.damaged
    ranks = table.set_index("query_id")["first_hit_before"]
    assert ranks[chosen.missed].isna().all() or len(chosen.missed) == 3


def test_choose_queries_does_not_depend_on_the_order_of_rows() -> None:
    table = made_up_queries(200)
    assert choose_queries(table) == choose_queries(table.sample(frac=1, random_state=1))
