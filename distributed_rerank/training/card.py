"""The model card: README.md in the folder of a trained model, as the Hugging Face hub shows it.

It says what the model was trained on, what it gained on labels that the measured weights had not seen, how to use it,
and where the figures end. Every figure comes from chain.json and training.json beside it.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.decision import ON_ALL_LABELS
from distributed_rerank.chain.promise import promise_in_words
from distributed_rerank.config.training import defaults_for
from distributed_rerank.models.saving import model_name
from distributed_rerank.training.task import TrainingTask

CARD = "README.md"
TEXT = """---
library_name: distributed_rerank
tags: [image-retrieval, re-ranking, metric-learning]
---

# Pairwise model `{name}` on {extractor}

Looks at a query image and one candidate ({size} pixels each) and says how different they are; re-orders
what nearest neighbours of an embedding found. {bytes_per_image:,} bytes are kept of an image,
a pair costs {gflop:.3g} GFLOP.

## Trained on

Split `train` of {source}: {n_images:,} images, {n_labels:,} labels (digest {digest}).

## Worth

{worth}

## Use

    distributed-rerank evaluate --catalogue df.csv --out evaluation --extractor {extractor} --model FOLDER
    distributed-rerank rerank --catalogue df.csv --candidates candidates.parquet --out reranked --model FOLDER

FOLDER is this folder or `hf-hub:owner/name`. In Python: `load_model(FOLDER)` of
`distributed_rerank.models.saving`; no pickled code is run. It was made by

    distributed-rerank train --catalogue df.csv --out FOLDER --extractor {extractor} --pairwise-model {name}

Settings other than the defaults: {settings}.{taught}

## Limits

The figures are those of train labels set aside, with the candidates of the extractor named above; images of
another kind, another extractor or much longer lists were not measured: run `distributed-rerank evaluate` on
your own labels first. Images that are near in the first stage and wrongly labelled are listed in suspects.parquet.
The logit is no probability; chain.json has the curve that makes one of it, fitted on the same labels.
"""


def model_card(task: TrainingTask, model: Any, chain: Chain) -> str:
    """The card's text."""
    name, catalogue = model_name(model), task.catalogue
    usual = defaults_for(name)
    changed = {
        field.name: getattr(task.config, field.name)
        for field in fields(usual)
        if getattr(task.config, field.name) != getattr(usual, field.name)
    }
    return TEXT.format(
        name=name,
        extractor=model.config.extractor.name,
        size=" x ".join(str(side) for side in model.transform.size),
        bytes_per_image=model.bytes_per_image,
        gflop=model.gflop_per_pair(),
        source=PurePosixPath(catalogue.source).name,
        n_images=task.n_labelled,
        n_labels=len(np.unique(catalogue.labels[catalogue.labels >= 0])),
        digest=catalogue.digest()[:12],
        worth=worth_section(chain),
        settings=", ".join(f"{key}={value}" for key, value in changed.items()) or "none",
        taught=" It learnt from a teacher model as well." if task.teacher is not None else "",
    )


def worth_section(chain: Chain) -> str:
    """The chain and its figures on the labels that it was chosen on."""
    on = chain.chosen_on
    if not on:
        return "The chain was given by hand; nothing was measured."
    lines = [f"Chain: {chain.describe()}", "", *([f"Note: {chain.evidence_text}.", ""] if chain.evidence_text else [])]
    if "n_queries" not in on:
        return "\n".join([*lines, "Nothing was measured."])
    lines += [
        f"On {on['n_queries']:,} images of {on['n_labels']:,} train labels{why_valid(on)}:",
        "",
        "| | mAP@10 | CMC@1 |",
        "|---|---|---|",
        *(f"| {title} | {figures['map@10']:.4f} | {figures['cmc@1']:.4f} |" for title, figures in figures_of(on)),
    ]
    ends = [[on[key]] if key in on else [] for key in ("adapt", "together")]
    for decision in [*ends[0], *on["decisions"], *ends[1]]:
        cells = [gain_cell(decision["gain"][key]) for key in ("map@10", "cmc@1")]
        what = decision["step"] if decision is on.get("together") else f"{decision['step']} step"
        title = f"gain of the {what}, {'taken' if decision['taken'] else 'not taken'}"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "Gains have 95 % intervals (bootstrap by label), constants chosen on the other labels."]
    promise = promise_in_words(on.get("promise", {}))
    lines += (
        ["", f"So {promise}. `evaluate` says what that is for your queries, and what they show."] if promise else []
    )
    return "\n".join(lines)


def why_valid(on: Mapping[str, Any]) -> str:
    """Why figures on these labels are evidence."""
    is_on_all = any(decision["taken"] and decision["step"].endswith(ON_ALL_LABELS) for decision in on["decisions"])
    return ", with a chain that does without the weights" if is_on_all else " that the measured weights have not seen"


def figures_of(on: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Each stage's name and figures: the first stage, over adapted embeddings if they are, and the chosen chain."""
    if not on.get("adapt", {}).get("taken"):
        return [("first stage", on["first_stage"]), ("chosen chain", on["chosen"])]
    return [
        ("first stage", on["adapt"]["first_stage"]),
        ("first stage, adapted", on["first_stage"]),
        ("chosen chain", on["chosen"]),
    ]


def gain_cell(gain: Mapping[str, Any]) -> str:
    """A gain with its interval."""
    return f"{gain['mean']:+.4f} [{gain['ci95'][0]:+.4f}, {gain['ci95'][1]:+.4f}]"
