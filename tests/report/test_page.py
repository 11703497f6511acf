"""The page: its tables hold what was measured, and a real browser can use it."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import Page, in_chromium
from PIL import Image
from report_examples import MEANS, TIMINGS, made_up_queries, metrics_of

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.report import Candidate, Strip, build_report, choose_queries
from distributed_rerank.report.cost import cost_rows
from distributed_rerank.report.formatting import signed

PARTS = ("first_stage", "reranked", "difference", "oracle")


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
    first = [Candidate(images[0], False, "d 0.500"), Candidate(images[1], True, "d 0.750")]
    last = [Candidate(images[1], True, "p 0.91"), Candidate(images[0], False, "")]
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
        {"torch": "2", "date": "2026-11-26", "command": "evaluate --out <there>"},
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


def test_report_table_is_recomputed_from_the_per_query_values_alone(report: Path) -> None:
    rows = {row[0]: row for row in cells(report.read_text(encoding="utf-8"), "metrics")}
    per_query = made_up_queries(40)
    for key, name in (("cmc@1", "CMC@1"), ("map@10", "mAP@10")):
        before, after = per_query[f"{key}_before"].mean(), per_query[f"{key}_after"].mean()
        assert rows[name][1:4] == [f"{before:.3f}", f"{after:.3f}", signed(float(after - before))]
        assert rows[name][4:] == ["−0.020 to +0.040", "3 / 2", "0.988"]


def test_report_category_table_holds_the_means_within_each_category(report: Path) -> None:
    rows = {row[0]: row for row in cells(report.read_text(encoding="utf-8"), "categories")}
    for name, group in made_up_queries(40).groupby("category"):
        expected = [group[f"{key}_{side}"].mean() for key in MEANS for side in ("before", "after")]
        assert [rows[str(name)][place] for place in (2, 3, 5, 6)] == [f"{value:.3f}" for value in expected]


def test_report_label_table_holds_the_means_of_each_label_worst_first(report: Path) -> None:
    rows = cells(report.read_text(encoding="utf-8"), "labels")[1:]
    changes = []
    table = made_up_queries(40)
    for name, n_queries, *values in rows:
        group = table[table["label"] == name]
        expected = [group[f"{key}_{side}"].mean() for key in MEANS for side in ("before", "after")]
        changes.append(expected[3] - expected[2])
        assert int(n_queries) == len(group)
        assert values == [*(f"{value:.3f}" for value in expected), signed(changes[-1])]
    assert len(rows) == 7
    assert changes == sorted(changes)


def test_report_begins_with_what_was_measured_when_and_by_which_command(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    (about,) = re.findall(r'<dl class="about">.*?</dl>', page, re.DOTALL)
    assert re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", about) == [
        ("Date", "2026-11-26"), ("Catalogue", "&lt;df&gt;.csv"), ("Command", "evaluate --out &lt;there&gt;"),
        ("Versions", "torch 2"),
    ]  # fmt: skip


def test_chain_without_pairs_has_no_rows_of_dashes_about_their_cost() -> None:
    metrics = {"curve": [{"top_n": 100, "metrics": {"map@10": 0.4, "cmc@1": 0.7}}], "knee": {"top_n": 100}}
    assert cost_rows(metrics, {}) == []
    assert cost_rows(metrics, {"curve": [{"top_n": 100, "pairs": 7}]})[0]["pairs"] == 7


def test_report_tables_hold_costs_and_baselines_as_measured(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    costs = {row[0]: row for row in cells(page, "costs")}
    assert costs["20 (knee)"][3:] == ["200", "60", "10.0", "0.00600", "80.0", "1.00", "5.00"]
    steps = {row[0]: row[1:] for row in cells(page, "steps")}
    assert list(steps) == ["Step", "First stage", "Pairwise model"]
    assert steps["Pairwise model"][4:] == ["500", "6,000", "12.5"]
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


def test_report_of_stored_metrics_lists_them_in_the_order_of_the_run(tmp_path: Path) -> None:
    """metrics.json has its names in the order of letters: cmc@10 before cmc@5."""
    per_query = made_up_queries(30)
    metrics = metrics_of(per_query)
    more = {part: {"cmc@5": metrics[part]["cmc@1"], "cmc@10": metrics[part]["cmc@1"]} for part in PARTS}
    metrics |= {part: metrics[part] | more[part] for part in PARTS}
    stored = json.loads(json.dumps(metrics, sort_keys=True))
    listed = []
    for number, given in enumerate((metrics, stored)):
        page = build_report(given, per_query, [], {}, {}, tmp_path / f"{number}.html").read_text(encoding="utf-8")
        listed.append([row[0] for row in cells(page, "metrics")][1:])
    assert listed[0] == listed[1]
    assert [name for name in listed[0] if name.startswith("CMC")] == ["CMC@1", "CMC@5", "CMC@10"]


def test_report_of_the_first_stage_alone_claims_no_comparison(tmp_path: Path) -> None:
    per_query = made_up_queries(30).drop(columns=["first_hit_after", "cmc@1_after", "map@10_after"])
    metrics = {
        "n_queries": 30,
        "n_gallery": 9,
        "n_without_relevant": 0,
        "first_stage": {"cmc@1": 0.5, "map@10": 0.25},
    }
    image = image_refs(tmp_path, 1)[0]
    strips = [
        Strip(ImageRef(name, image.path), [Candidate(image, False, "d 1.000")], []) for name in per_query["query_id"]
    ]
    page = build_report(metrics, per_query, strips, {}, {}, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "First stage alone: mAP@10 is 0.250, CMC@1 0.500." in page
    assert "After" not in page
    assert page.count('class="strip"') == 6


def test_report_shows_an_image_that_vanished_as_a_word(tmp_path: Path) -> None:
    per_query = made_up_queries(30)
    gone = ImageRef("gone", str(tmp_path / "gone.jpg"))
    name = choose_queries(per_query).improved[0]
    strips = [Strip(ImageRef(name, gone.path), [Candidate(gone, True, "d 0.100")], [])]
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


def test_report_in_chromium_enlarges_a_picture_and_reads_a_threshold(report: Path, tmp_path: Path) -> None:
    async def visit(page: Page) -> dict[str, Any]:
        await page.open(report, 390)
        seen = {"at": await page.evaluate("document.getElementById('at-threshold').textContent")}
        await page.evaluate("threshold.value = 0; threshold.dispatchEvent(new Event('input'))")
        seen["lowest"] = await page.evaluate("document.getElementById('at-threshold').textContent")
        await page.evaluate("document.querySelector('.row .enlarge').click()")
        seen["open"] = await page.evaluate("document.getElementById('large').open")
        seen["wide"] = await page.evaluate("document.querySelector('#large img').getBoundingClientRect().width")
        seen["small"] = await page.evaluate("document.querySelector('.row img').getBoundingClientRect().width")
        seen["link"] = await page.evaluate("document.querySelector('#large a').href")
        return seen | {"complaints": page.complaints}

    seen = in_chromium(tmp_path, visit)
    assert seen["at"].startswith("At 0.90: 10 candidates are accepted, none of them are right; 0 of 100 right items")
    assert seen["lowest"].startswith("At 0.10: 200 candidates are accepted, 25 of 100 of them are right")
    assert seen["lowest"].endswith("40 queries get an answer, 50 of 100 of these have the right item first.")
    assert seen["open"]
    assert seen["wide"] > 2 * seen["small"]
    assert seen["link"].startswith("file://")
    assert seen["complaints"] == []


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


def test_markup_that_slips_through_runs_no_script_and_fetches_nothing(report: Path, tmp_path: Path) -> None:
    """The policy is the second wall behind the escaping, which is taken down here."""
    page = report.read_text(encoding="utf-8")
    policy = re.search('<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    attack = (
        "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
        '<img src="https://example.com/seen.png"><iframe src="https://example.com/"></iframe>'
    )
    report.write_text(page.replace("<main>", f"<main>{attack}", 1), encoding="utf-8")

    async def visit(tab: Page) -> dict[str, Any]:
        await tab.open(report, 1280)
        return {"title": await tab.evaluate("document.title"), "complaints": tab.complaints}

    seen = in_chromium(tmp_path, visit)
    assert seen["title"] == "Re-ranking report"
    assert any("Content Security Policy" in complaint for complaint in seen["complaints"])


def test_label_that_is_a_script_is_shown_as_text(tmp_path: Path) -> None:
    script = "</td></table><script>document.title = 'taken'</script>"
    per_query = made_up_queries(20).assign(label=script, category=script)
    metrics = metrics_of(per_query)
    out = build_report(metrics, per_query, [], {"catalogue": script}, {script: script}, tmp_path / "r.html")
    assert script not in out.read_text(encoding="utf-8")
    assert "&lt;script&gt;document.title" in out.read_text(encoding="utf-8")
