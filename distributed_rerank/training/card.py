"""The model card: README.md in the folder of a trained model, as the Hugging Face hub shows it. Layer 3.

It says what was trained on what, what that was worth on labels that the judged weights had not seen, how to use it, and
where it ends. Every figure in it comes from chain.json and training.json beside it.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.training import defaults_for
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.models.saving import model_name
from distributed_rerank.training.task import TrainingTask

CARD = "README.md"
FRONT_MATTER = """---
library_name: distributed_rerank
tags: [image-retrieval, re-ranking, metric-learning]
---
"""


def model_card(task: TrainingTask, model: Any, chain: Chain) -> str:
    """The card's text."""
    name, extractor = model_name(model), model.config.extractor.name
    size = " x ".join(str(side) for side in model.transform.size)
    return "\n".join(
        [
            FRONT_MATTER,
            f"# Pairwise model `{name}` on {extractor}",
            "",
            f"Looks at a query image and one candidate ({size} pixels each) and says how different they are; re-orders",
            f"what nearest neighbours of an embedding found. {model.bytes_per_image:,} bytes are kept of an image,",
            f"a pair costs {model.gflop_per_pair():.3g} GFLOP.",
            "",
            *data_section(task.catalogue),
            *worth_section(chain),
            *use_section(name, extractor, task),
            *limits_section(),
        ]
    )


def data_section(catalogue: Catalogue) -> list[str]:
    """What was trained on."""
    n_labels = len(np.unique(catalogue.labels[catalogue.labels >= 0]))
    source, digest = PurePosixPath(catalogue.source).name, catalogue.digest()[:12]
    return [
        "## Trained on",
        "",
        f"Split `train` of {source}: {len(catalogue):,} images, {n_labels:,} labels (digest {digest}).",
        "",
    ]


def worth_section(chain: Chain) -> list[str]:
    """The chain and what it was worth where it was chosen."""
    on = chain.chosen_on
    if not on:
        return ["## Worth", "", "The chain was given by hand; nothing was measured.", ""]
    lines = [
        "## Worth",
        "",
        f"Chain: {chain.describe()}",
        "",
        f"On {on['n_queries']:,} images of {on['n_labels']:,} train labels that the judged weights have not seen:",
        "",
        "| | mAP@10 | CMC@1 |",
        "|---|---|---|",
        figures_row("first stage", on["first_stage"]),
        figures_row("chosen chain", on["chosen"]),
    ]
    for decision in on["decisions"]:
        cells = [gain_cell(decision["gain"], key) for key in ("map@10", "cmc@1")]
        title = f"gain of the {decision['step']} step, {'taken' if decision['taken'] else 'not taken'}"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, "", "Gains have 95 % intervals (bootstrap by label), constants chosen on the other labels.", ""]


def figures_row(title: str, figures: Mapping[str, float]) -> str:
    """One row of two figures."""
    return f"| {title} | {figures['map@10']:.4f} | {figures['cmc@1']:.4f} |"


def gain_cell(gain: Mapping[str, Any], key: str) -> str:
    """A gain with its interval."""
    found = gain[key]
    return f"{found['mean']:+.4f} [{found['ci95'][0]:+.4f}, {found['ci95'][1]:+.4f}]"


def use_section(name: str, extractor: str, task: TrainingTask) -> list[str]:
    """How to load it and how it was made."""
    usual = defaults_for(name)
    changed = {
        field.name: getattr(task.config, field.name)
        for field in fields(usual)
        if getattr(task.config, field.name) != getattr(usual, field.name)
    }
    settings = ", ".join(f"{key}={value}" for key, value in changed.items()) or "none"
    taught = " It learnt from a teacher model as well." if task.teacher is not None else ""
    return [
        "## Use",
        "",
        f"    python jobs/evaluate.py --catalogue df.csv --out evaluation --extractor {extractor} --model FOLDER",
        "    python jobs/rerank.py --catalogue df.csv --candidates candidates.parquet --out reranked --model FOLDER",
        "",
        "FOLDER is this folder or `hf-hub:owner/name`. In Python: `load_model(FOLDER)` of",
        "`distributed_rerank.models.saving`; no pickled code is run. It was made by",
        "",
        f"    python jobs/train.py --catalogue df.csv --out FOLDER --extractor {extractor} --pairwise-model {name}",
        "",
        f"Settings other than the defaults: {settings}.{taught}",
        "",
    ]


def limits_section() -> list[str]:
    """Where the figures end."""
    return [
        "## Limits",
        "",
        "The figures are those of train labels set aside, with the candidates of the extractor named above; images of",
        "another kind, another extractor or much longer lists were not measured: run jobs/evaluate.py on your own",
        "labels first. Images that are near in the first stage and wrongly labelled are listed in suspects.parquet.",
        "The logit is no probability; chain.json has the curve that makes one of it, fitted on the same labels.",
        "",
    ]
