"""Pages of ``examples/serving`` as what they let a reader run: code blocks, in order, by language."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every code block of a page."""
    return BLOCK.findall((ROOT / "examples/serving" / page).read_text(encoding="utf-8"))
