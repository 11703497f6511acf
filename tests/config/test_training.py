"""Training settings: a wrong value is refused by its name, and each model has defaults of its kind."""

from typing import Any

import pytest

from distributed_rerank.config.training import TrainingConfig, defaults_for
from distributed_rerank.errors import BadInput


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"set_aside": 1.0}, "set_aside=1.0"),
        ({"top_n": 60, "n_items": 50}, "top_n=60 exceeds the 50"),
        ({"mining": "batch", "loss": "listwise"}, "listwise"),
        ({"views": 2, "augmentation": None}, "views=2"),
    ],
)
def test_config_with_a_wrong_value_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        TrainingConfig(**changes)


def test_defaults_of_models_that_learn_from_images_train_their_backbone() -> None:
    assert defaults_for("token") == TrainingConfig()
    assert defaults_for("concat").backbone_lr > 0
