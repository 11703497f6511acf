"""The report: what it says, which queries it shows, and that a real browser can use it."""

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import Page, in_chromium
from PIL import Image

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.report import Candidate, Strip, build_report, choose_queries
from distributed_rerank.report.formatting import metric_name, p_value, signed, verdict
from distributed_rerank.report.plots import rank_changes

MEANS = ("cmc@1", "map@10")


def made_up_queries(n_queries: int, seed: int = 0) -> pd.DataFrame:
    """Per-query values with one relevant item a query, so that mAP@10 is the reciprocal rank up to 10."""
    rng = np.random.default_rng(seed)
    before, after = (pd.Series(rng.integers(1, 16, n_queries), dtype="Int64") for _ in range(2))
    before, after = before.mask(before > 14), after.mask(after > 14)
    table = {
        "query_id": [f"q{number:06d}" for number in range(n_queries)],
        "label": [f"label <{number % 7}>" for number in range(n_queries)],
        "category": [f"kind {number % 3}" for number in range(n_queries)],
        "n_relevant": 1,
        "first_hit_before": before,
        "first_hit_after": after,
    }
    for side, ranks in (("before", before), ("after", after)):
        places = ranks.astype("Float64").to_numpy(dtype=float, na_value=np.inf)
        table[f"cmc@1_{side}"] = (places <= 1).astype(float)
        table[f"map@10_{side}"] = np.where(places <= 10, 1 / places, 0.0)
    return pd.DataFrame(table)


SUSPECT = {
    "query_id": "image <0>",
    "query_label": "this",
    "gallery_id": "image 1",
    "gallery_label": "that",
    "distance": 0.125,
    "rank": 2,
}
TIMINGS = {
    "curve": [
        {"top_n": n, "seconds": 2.0 * n, "seconds_per_query": 0.05 * n, "worker_seconds": 4.0 * n,
         "price_per_1000_queries": 0.25 * n}
        for n in (5, 20, 50)
    ],
    "baselines": {"k_reciprocal": 1.25},
}  # fmt: skip


def baselines_of(last: dict[str, float], against: float = -0.1) -> dict[str, Any]:
    """One that was measured, one that follows the pairwise step, one that was not run."""
    change = {"mean": 0.05, "ci95": [0.02, 0.08]}
    compared = {"mean": against, "ci95": [against - 0.01, against + 0.01]}
    figures = {"metrics": last, "difference": {"map@10": change}, "against_reranked": {"map@10": compared}}
    return {
        "k_reciprocal": {"after": "first_stage", "constants": {"k1": 20, "weight": 0.3}, **figures},
        "pairwise+query_expansion": {"after": "pairwise", "constants": {"k": 5}, **figures},
        "database_augmentation": {"after": "first_stage", "constants": {"k": 5}, "skipped": "it needs <embeddings>"},
    }


def metrics_of(per_query: pd.DataFrame) -> dict[str, Any]:
    first = {key: float(per_query[f"{key}_before"].mean()) for key in MEANS}
    last = {key: float(per_query[f"{key}_after"].mean()) for key in MEANS}
    differences = {
        key: {
            "mean": last[key] - first[key],
            "ci95": [-0.02, 0.04],
            "p_value": 0.4,
            "n_better": 3,
            "n_worse": 2,
        }
        for key in MEANS
    }
    return {
        "n_queries": len(per_query),
        "n_gallery": 1234,
        "n_without_relevant": 5,
        "n_rejected": 1,
        "first_stage": first,
        "reranked": last,
        "oracle": {key: 0.9876 for key in MEANS},
        "difference": differences,
        "curve": [
            {"top_n": n, "pairs": 10 * n, "images": 60, "gflop": 0.5 * n, "bytes": 6000, "metrics": last}
            for n in (5, 20, 50)
        ],
        "knee": {"metric": "map@10", "top_n": 20},
        "top_n": 50,
        "baselines": baselines_of(last),
        "adaptive": {
            "metric": "map@10",
            "kept_gain": 0.95,
            "chosen_on": "the other half",
            "thresholds": [{"signal": "gap", "threshold": 0.5}, {"signal": "spread", "threshold": None}],
            "n_skipped": 10,
            "pairs": 500,
            "pairs_saved": 125,
            "first_stage": first["map@10"],
            "reranked": last["map@10"],
            "adaptive": last["map@10"] - 0.004,
            "difference": {"mean": -0.004, "ci95": [-0.009, 0.001]},
            "curve": {"gap": [{"share": share / 4, "map@10": 0.5 - 0.1 * share} for share in range(5)]},
        },
        "distances": {
            "first_stage": {"top_n": 50, "edges": [0, 0.5, 1], "relevant": [30, 10], "other": [10, 90]},
            "reranked": {"top_n": 50, "edges": [-1, 0, 1], "relevant": [40, 0], "other": [0, 100]},
        },
        "suspects": [SUSPECT],
        "oml": {"first_stage": first, "reranked": last},
        "cost": {"pairs": 500, "gflop_per_pair": 0.25},
    }


def image_refs(folder: Path, count: int) -> list[ImageRef]:
    refs = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (60, 40), (40 * number % 256, 90, 160)).save(path)
        refs.append(ImageRef(f"image {number}", str(path)))
    return refs


@pytest.fixture
def report(tmp_path: Path) -> Path:
    per_query = made_up_queries(40)
    images = image_refs(tmp_path, 4)
    first = [Candidate(images[0], False, 0.5), Candidate(images[1], True, 0.75)]
    last = [Candidate(images[1], True, 0.25), Candidate(images[0], False, 0.5)]
    chosen = choose_queries(per_query)
    strips = [
        Strip(ImageRef(name, images[2].path), first, last)
        for name in [*chosen.improved, *chosen.damaged, *chosen.missed]
    ]
    rejects = pd.DataFrame({"id": ["bad <one>"], "path": ["x"], "stage": ["embed"], "reason": ["truncated"]})
    config = {"catalogue": "<df>.csv", "rerank": {"top_n": 50}, "ks": [1, 5]}
    out = tmp_path / "report.html"
    return build_report(
        metrics_of(per_query),
        per_query,
        strips,
        config,
        {"torch": "2"},
        out,
        rejects,
        TIMINGS,
        [(images[0], images[1])],
    )


def cells(page: str, table_id: str) -> list[list[str]]:
    table = re.search(rf'<table id="{table_id}".*?</table>', page, re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr.*?</tr>", table.group(), re.DOTALL)
    plain = [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]
    return [[html.unescape(cell).strip() for cell in row] for row in plain]


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


def test_rank_changes_count_every_query_once() -> None:
    table = made_up_queries(500)
    counts = dict(rank_changes(table))
    assert sum(counts.values()) == 500
    before, after = (table[f"first_hit_{side}"].fillna(99).astype(int) for side in ("before", "after"))
    assert counts["same"] == (before == after).sum()
    assert counts["up 1"] == ((before - after == 1) & (before < 99)).sum()
    assert counts["lost"] == ((before < 99) & (after == 99)).sum()


@pytest.mark.parametrize(
    ("interval", "tone", "claim"),
    [
        ([0.01, 0.03], "good", "Re-ranking helps"),
        ([-0.03, -0.01], "bad", "makes the order worse"),
        ([-0.01, 0.03], "open", "no difference that these queries can show"),
    ],
)
def test_verdict_follows_the_interval(interval: list[float], tone: str, claim: str) -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["difference"]["map@10"]["ci95"] = interval
    found = verdict(metrics, both=True)
    assert found.tone == tone
    assert claim in found.sentence


def test_verdict_says_first_that_a_baseline_without_training_is_better() -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["difference"]["map@10"]["ci95"] = [0.01, 0.03]
    assert "Best without training: k-reciprocal" in verdict(metrics, both=True).detail
    metrics["baselines"] = baselines_of(metrics["reranked"], against=0.04)
    found = verdict(metrics, both=True)
    assert found.tone == "bad"
    assert found.sentence.startswith("k-reciprocal re-ranking, which needs no training, is better than this chain")
    assert "+0.040; 95 % interval +0.030 to +0.050" in found.sentence
    assert found.detail.startswith("Re-ranking helps")
    metrics["baselines"] = baselines_of(metrics["reranked"], against=0.005)
    assert verdict(metrics, both=True).tone == "good", "not beyond chance"


@pytest.mark.parametrize("gain", [0.0, -0.01])
def test_verdict_calls_no_baseline_best_that_gains_nothing(gain: float) -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["baselines"]["k_reciprocal"]["difference"]["map@10"]["mean"] = gain
    assert "Best" not in verdict(metrics, both=True).detail
    assert "Nothing is gained without training; at best: k-reciprocal" in verdict(metrics, both=True).detail


def test_wording_of_numbers_and_names() -> None:
    assert [signed(value) for value in (0.0374, -0.02, -0.0001, 0.0, None)] == [
        "+0.037",
        "−0.020",
        "0.000",
        "0.000",
        "–",
    ]
    assert [p_value(value) for value in (0.0004, 0.04, None)] == ["< 0.001", "0.040", "–"]
    assert [metric_name(key) for key in ("map@10", "map@r", "cmc@1", "mrr")] == [
        "mAP@10",
        "mAP@R",
        "CMC@1",
        "MRR",
    ]


def test_report_table_is_recomputed_from_the_per_query_values_alone(report: Path) -> None:
    rows = {row[0]: row for row in cells(report.read_text(encoding="utf-8"), "metrics")}
    per_query = made_up_queries(40)
    for key, name in (("cmc@1", "CMC@1"), ("map@10", "mAP@10")):
        before, after = per_query[f"{key}_before"].mean(), per_query[f"{key}_after"].mean()
        assert rows[name][1:4] == [f"{before:.3f}", f"{after:.3f}", signed(float(after - before))]
        assert rows[name][4:] == ["−0.020 to +0.040", "0.400", "3 / 2", "0.988"]


def test_report_category_table_holds_the_means_within_each_category(report: Path) -> None:
    rows = {row[0]: row for row in cells(report.read_text(encoding="utf-8"), "categories")}
    for name, group in made_up_queries(40).groupby("category"):
        expected = [group[f"{key}_{side}"].mean() for key in MEANS for side in ("before", "after")]
        assert [rows[str(name)][place] for place in (2, 3, 5, 6)] == [f"{value:.3f}" for value in expected]


def test_report_tables_hold_costs_and_baselines_as_measured(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    costs = {row[0]: row for row in cells(page, "costs")}
    assert costs["20 (knee)"][3:] == ["200", "60", "10.0", "0.00600", "80.0", "1.00", "5.00"]
    rows = {row[0]: row[1:] for row in cells(page, "baselines")}
    mean = f"{made_up_queries(40)['map@10_after'].mean():.3f}"
    assert list(rows) == [
        "Method", "This chain", "k-reciprocal re-rankingk1=20, weight=0.3", "Database augmentationk=5",
        "Pairwise step, then alpha query expansionk=5",
    ]  # fmt: skip
    k_reciprocal = rows["k-reciprocal re-rankingk1=20, weight=0.3"]
    assert (k_reciprocal[0], k_reciprocal[2:]) == (
        mean, ["+0.050+0.020 to +0.080", "−0.100−0.110 to −0.090", "1.25"]
    )  # fmt: skip
    assert rows["Database augmentationk=5"] == ["Not run: it needs <embeddings>."]
    assert "saves 125 of 500 pairs (25 %) and changes mAP@10 by −0.004 (−0.009 to +0.001)" in page
    assert "the two overlap by 35 %" in page
    assert "image &lt;0&gt;" in page


def test_report_escapes_what_users_wrote_and_asks_for_no_address(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert "label &lt;1&gt;" in page
    assert "label <1>" not in page
    assert "bad &lt;one&gt;" in page
    assert "&lt;df&gt;.csv" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_report_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    per_query = made_up_queries(30)
    pages = [
        build_report(metrics_of(per_query), per_query, [], {}, {}, tmp_path / f"{number}.html").read_bytes()
        for number in range(2)
    ]
    assert pages[0] == pages[1]


def test_report_of_the_first_stage_alone_claims_no_comparison(tmp_path: Path) -> None:
    per_query = made_up_queries(30).drop(columns=["first_hit_after", "cmc@1_after", "map@10_after"])
    metrics = {
        "n_queries": 30,
        "n_gallery": 9,
        "n_without_relevant": 0,
        "first_stage": {"cmc@1": 0.5, "map@10": 0.25},
    }
    image = image_refs(tmp_path, 1)[0]
    strips = [Strip(ImageRef(name, image.path), [Candidate(image, False, 1.0)], []) for name in per_query["query_id"]]
    page = build_report(metrics, per_query, strips, {}, {}, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "First stage alone: mAP@10 is 0.250, CMC@1 0.500." in page
    assert "After" not in page
    assert page.count('class="strip"') == 6


def test_report_shows_an_image_that_vanished_as_a_word(tmp_path: Path) -> None:
    per_query = made_up_queries(30)
    gone = ImageRef("gone", str(tmp_path / "gone.jpg"))
    name = choose_queries(per_query).improved[0]
    strips = [Strip(ImageRef(name, gone.path), [Candidate(gone, True, 0.1)], [])]
    out = build_report(metrics_of(per_query), per_query, strips, {}, {}, tmp_path / "report.html")
    assert out.read_text(encoding="utf-8").count("no image</span>") == 2


def test_report_of_many_queries_stays_small_and_says_what_it_left_out(tmp_path: Path) -> None:
    per_query = made_up_queries(100_000)
    out = build_report(metrics_of(per_query), per_query, [], {}, {}, tmp_path / "report.html")
    assert out.stat().st_size < 2_000_000
    page = out.read_text(encoding="utf-8")
    assert len(cells(page, "queries")) == 2000 + 1
    assert "The 2,000 of 100,000 queries that changed most" in page
    shown = {row[0] for row in cells(page, "queries")[1:]}
    change = (per_query["map@10_after"] - per_query["map@10_before"]).abs()
    least_shown = change[per_query["query_id"].isin(shown)].min()
    assert least_shown >= change[~per_query["query_id"].isin(shown)].max()


@pytest.mark.parametrize("width", [390, 1280])
def test_report_in_chromium_loads_everything_and_fits_the_width(report: Path, tmp_path: Path, width: int) -> None:
    async def visit(page: Page) -> dict[str, Any]:
        await page.open(report, width)
        return await page.evaluate(
            """({images: [...document.images].map(image => image.naturalWidth),
                 unnamed: [...document.images].filter(image => !image.alt).length,
                 overflow: document.documentElement.scrollWidth - innerWidth,
                 cut: [...document.querySelectorAll("svg text")].filter(text => {
                   const box = text.getBoundingClientRect();
                   const frame = text.closest("svg").getBoundingClientRect();
                   return box.left < frame.left - 1 || box.right > frame.right + 1;
                 }).map(text => text.textContent)})"""
        ) | {"complaints": page.complaints, "requests": page.requests}

    seen = in_chromium(tmp_path, visit)
    assert seen["complaints"] == []
    assert {address.partition(":")[0] for address in seen["requests"]} <= {"file", "data"}
    assert len(seen["images"]) > 30
    assert min(seen["images"]) > 0
    assert seen["unnamed"] == 0
    assert seen["overflow"] <= 0
    assert seen["cut"] == []


SHOWN_ROWS = '[...document.querySelectorAll("#queries tbody tr")].filter(row => !row.hidden)'


def column(number: int) -> str:
    return f"{SHOWN_ROWS}.map(row => row.cells[{number}].textContent)"


def test_report_in_chromium_query_table_sorts_and_filters(report: Path, tmp_path: Path) -> None:
    async def visit(page: Page) -> dict[str, Any]:
        await page.open(report, 1280)
        click = 'document.querySelectorAll("#queries thead button")[4]'
        seen = {}
        # The keyboard's way: focus, then Enter.
        await page.evaluate(f"{click}.focus()")
        for kind in ("keyDown", "keyUp"):
            await page.command(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                windowsVirtualKeyCode=13,
                text="\r",
            )
        seen["up"] = await page.evaluate(column(4))
        seen["aria"] = await page.evaluate(f'{click}.closest("th").getAttribute("aria-sort")')
        await page.evaluate(f"{click}.click()")
        seen["down"] = await page.evaluate(column(4))
        await page.evaluate("document.getElementById('search').focus()")
        await page.command("Input.insertText", text="KIND 1")
        seen["found"] = await page.evaluate(column(2))
        seen["said"] = await page.evaluate("document.getElementById('shown').textContent")
        await page.evaluate("outcome.value = 'worse'; outcome.dispatchEvent(new Event('change'))")
        seen["worse"] = await page.evaluate(column(8))
        return seen | {"complaints": page.complaints}

    seen = in_chromium(tmp_path, visit)
    table = made_up_queries(40)
    ranks = sorted(int(rank) for rank in table["first_hit_before"].dropna())
    missing = ["–"] * (40 - len(ranks))
    assert seen["up"] == [*map(str, ranks), *missing]
    assert seen["aria"] == "ascending"
    assert seen["down"] == [*map(str, reversed(ranks)), *missing]
    is_kind = table["category"] == "kind 1"
    assert seen["found"] == ["kind 1"] * int(is_kind.sum())
    assert seen["said"] == f"{is_kind.sum()} queries shown"
    is_worse = is_kind & (table["map@10_after"] < table["map@10_before"])
    assert len(seen["worse"]) == is_worse.sum() > 0
    assert all(change.startswith("−") for change in seen["worse"])
    assert seen["complaints"] == []
