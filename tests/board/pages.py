"""What stands in an index.html: the data that its script draws the board from."""

import json
import re
from pathlib import Path
from typing import Any


def read_page_data(page: Path) -> dict[str, Any]:
    """The JSON of the page's data element, as a browser would find it: up to the first end of a script element."""
    found = re.search(r'<script type="application/json" id="board-data">(.*?)</script', page.read_text(), re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))
