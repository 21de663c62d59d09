"""What a page of attention holds."""

import json
import re
from typing import Any


def data_of(page: str) -> dict[str, Any]:
    """The data in the HTML of `viz.attention_page`."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)
