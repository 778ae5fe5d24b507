"""What commands write where nobody names a folder must not get into a commit: features of private images above all."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_default_output_folders_are_ignored() -> None:
    ignored = set((ROOT / ".gitignore").read_text().split())
    sources = [*(ROOT / "src/panfm/cli").glob("*.py"), ROOT / "src/panfm/evaluation/run_config.py"]
    pattern = re.compile(r'(?:= Path\(|_dir: str = )"(\w+)[\w/]*"')
    defaults = {found for source in sources for found in pattern.findall(source.read_text())}
    assert {"cache", "runs", "demo"} <= defaults  # the pattern finds them
    assert {name for name in defaults if f"/{name}/" not in ignored} == set()
