"""The Content-Security-Policy of the pages that jobs write: nothing runs or loads that the page did not come with."""

import base64
import hashlib
import re

_PLACE = '<meta charset="utf-8">'
_OWN_BLOCKS = {"style-src": "style", "script-src": "script"}


def with_policy(page: str) -> str:
    """The page with its policy: its own style and script blocks by their digests, images in the page, nothing else.

    A label or a reason that slips through the escaping as markup still runs no script and fetches nothing.
    """
    assert _PLACE in page, "a page says its encoding"
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for rule, tag in _OWN_BLOCKS.items():
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        rules.append(" ".join([rule, *map(_digest, blocks)] if blocks else [rule, "'none'"]))
    policy = f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(rules)}">'
    return page.replace(_PLACE, f"{_PLACE}\n{policy}", 1)


def _digest(block: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
