"""Places that match and the test that takes them away, against plain loops; what the page shows of them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from online.examples import KINDS, save_example
from small_catalogue import save_picture

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import read_image
from distributed_rerank.evaluation.why import explainer_of
from distributed_rerank.models.saving import build_model, load_model
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.report.why import Why, drawn, mutual


def test_mutual_places_are_those_of_a_loop() -> None:
    table = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (9, 9)).astype(np.float32))
    expected = [
        (row, column)
        for row in range(9)
        for column in range(9)
        if column == int(table[row].argmax()) and row == int(table[:, column].argmax())
    ]
    expected.sort(key=lambda place: -float(table[place]))
    assert mutual(table, 9).tolist() == [list(place) for place in expected]
    assert mutual(table, 2).tolist() == [list(place) for place in expected[:2]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenSiamese, list[ImageRef], Why]:
    folder = tmp_path_factory.mktemp("why")
    refs = []
    for number in range(2):
        save_picture(folder / f"{number}.png", number)
        refs.append(ImageRef(f"<{number}>", str(folder / f"{number}.png")))
    model = load_model(save_example("token", folder / "model"))
    assert isinstance(model, TokenSiamese)
    explain = explainer_of(model)
    assert explain is not None
    answer = explain(refs[0], refs[1], 0.7)
    assert answer is not None
    return model, refs, answer


def test_logit_is_the_models_and_falls_back_on_pictures_without_the_places(found) -> None:
    model, refs, why = found
    query, candidate = (model.transform(read_image(ref)) for ref in refs)
    changed = query.clone()
    for cell in why.places[:, 0].tolist():
        row, column = divmod(cell, 3)
        bounds = [round(edge * 32 / 3) for edge in range(4)]
        for channel in range(3):
            mean = query[channel].float().mean().round().to(torch.uint8)
            changed[channel, bounds[row] : bounds[row + 1], bounds[column] : bounds[column + 1]] = mean
    assert not torch.equal(changed, query)
    for picture, expected in ((query, why.logit), (changed, why.without_places)):
        encoded = model.encode(torch.stack([picture, candidate]))
        logit = model(encoded[:1], encoded[1:], torch.tensor([0.7])).detach()
        assert float(logit) == pytest.approx(expected, abs=1e-3)
    assert why.without_others is None or np.isfinite(why.without_others)


def test_picture_joins_the_places_that_match(found) -> None:
    *_, why = found
    picture = str(drawn(why))
    lines = re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', picture)

    def centre(left: int, place: int) -> list[float]:
        return [left + (place % 3 + 0.5) * 220 / 3, (place // 3 + 0.5) * 220 / 3]

    expected = [[*centre(0, query), *centre(268, other)] for query, other in why.places.tolist()]
    np.testing.assert_allclose(np.array(lines, float), expected, atol=0.06)
    assert picture.count("data:image/jpeg;base64,") == 2
    assert "&lt;1&gt;" in picture


@pytest.mark.parametrize(
    ("without_places", "without_others", "words"),
    [(2.0, -2.9, "others: these places carry the match"), (-2.0, -1.5, "does not hang on these places alone"),
     (None, None, "No place of one photo")],
)  # fmt: skip
def test_words_follow_the_numbers(found, without_places: float, without_others: float, words: str) -> None:
    *_, why = found
    said = Why(why.query, why.candidate, 3, why.places, -3.0, without_places, without_others, "c").in_words()
    assert words in said


def test_model_without_tokens_and_a_photo_that_is_gone_explain_nothing(found, tmp_path: Path) -> None:
    model, refs, _ = found
    assert explainer_of(None) is explainer_of(build_model(KINDS["distance"])) is None
    explain = explainer_of(model)
    assert explain is not None
    assert explain(refs[0], ImageRef("gone", str(tmp_path / "gone.png")), 0.5) is None
