import subprocess
import sys

from distributed_rerank.cluster import decode_rows
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.extraction import plan


def test_manifest_row_keeps_every_field_of_the_images() -> None:
    refs = [ImageRef("a", "/x/a.png", (1, 2, 3, 4)), ImageRef("b", "/x/b.png"), ImageRef("c", "s3://x/c.png")]
    rows = [table.slice(at, 1) for table in decode_rows.manifest(plan(refs, 2)) for at in range(len(table))]
    assert [decode_rows._refs(row) for row in rows] == [refs[:2], refs[2:]]


def test_process_that_decodes_does_not_import_the_models() -> None:
    """They double its start: it has the pictures' files, sizes and a resize to know."""
    heavy = "{'timm', 'torchvision', 'torch._dynamo'}"
    code = f"import sys, distributed_rerank.cluster.decode_rows; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
