"""Tutorial: from a folder of photos to a report, and to the answer for one photo. It prints each command.

    python docs/tutorial.py                                                           # generated photos, no network
    python docs/tutorial.py PHOTOS --extractor "--extractor vit_small_patch16_224.dino"    # yours: one folder a label

A program like any other: read it from top to bottom, and copy the commands. tests/jobs/test_tutorial.py runs it.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd

from distributed_rerank import Reranker
from distributed_rerank.demo.catalogue import write_demo_catalogue

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "photos", type=Path, nargs="?", help="folder with one folder a label; default: photos are generated"
)
parser.add_argument("--out", type=Path, default=Path("out/tutorial"))
parser.add_argument("--extractor", help="options that name a pretrained network; default: a small one is trained")
parser.add_argument("--workers", default="2", help="Ray workers; 0 = this process alone")
arguments = parser.parse_args()
out: Path = arguments.out


def run(command: str) -> None:
    """One command of `distributed-rerank`."""
    sys.stdout.write(f"\n$ distributed-rerank {command}\n")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "distributed_rerank", *shlex.split(command)], check=True)


# 1. The photos: a folder for each label. Without photos of your own, the demo's are sorted into such folders.
photos: Path | None = arguments.photos
if photos is None:
    photos = out / "photos"
    table = pd.read_csv(write_demo_catalogue(out / "generated", n_designs=48))
    for number, row in table.iterrows():
        folder = photos / str(row["label"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes((out / "generated" / str(row["path"])).read_bytes())

# 2. The catalogue: a table with a row for each photo. Half of the labels are set aside to measure on: a re-ranker must
#    be good at labels that it has never seen.
catalogue = out / "photos.csv"
if not catalogue.exists():
    run(f"catalogue {photos} --out {catalogue}")

# 3. The extractor turns photos into vectors. A pretrained one is named and fetched. Without a network a small one is
#    trained here, on half of the train labels; the next step learns from the other half.
common = f"--num-workers {arguments.workers}"
if arguments.extractor is None:
    extractor = "--extractor test_resnet --extractor-args norm_layer=groupnorm1 --image-size 96"
    run(
        f"train-extractor --catalogue {catalogue} --out {out}/extractor {extractor} --extractor-weights none "
        f"--epochs 6 --n-labels 8 --lr 3e-3 --backbone-lr 3e-3 --set-aside 0.5 {common}"
    )
    extractor += f" --extractor-weights {out}/extractor/extractor.safetensors"
else:
    extractor = arguments.extractor

# 4. The pairwise model learns to look at two photos together. Which steps re-rank, and whether any does, is chosen on
#    train labels that are set aside.
run(f"train --catalogue {catalogue} --out {out}/model {extractor} --epochs 5 {common}")

# 5. The report: metrics before and after on the labels that nothing has seen, with intervals, and pictures.
run(f"evaluate --catalogue {catalogue} --out {out}/evaluation --model {out}/model {extractor} {common}")
metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
final = metrics.get("reranked") or metrics["first_stage"]
sys.stdout.write(
    f"\nmAP@10 {metrics['first_stage']['map@10']:.3f} -> {final['map@10']:.3f}: {out}/evaluation/report.html\n"
)

# 6. One photo at a time, as a search service asks: the gallery is encoded once, then each question takes milliseconds.
table = pd.read_csv(catalogue, dtype=str)
gallery = table[table["split"] == "validation"].reset_index(drop=True)
paths = [catalogue.parent / path for path in gallery["path"]]
with Reranker.from_pretrained(out / "model", cache=out / "cache") as reranker:
    reranker.add(gallery["path"], paths)
    candidates = gallery["path"][1:51].tolist()  # in earnest: the ids that your vector database returned
    for match in reranker.rank(paths[0], candidates, top_k=5):
        chance = "" if match.probability is None else f"{match.probability:.2f}"
        sys.stdout.write(f"{match.id:40} {chance}\n")

# 7. The same over HTTP: distributed-rerank serve out/tutorial/model --catalogue out/tutorial/photos.csv --cache ...
