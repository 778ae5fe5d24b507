"""Permitted uses on the command line: build and export refuse what a source does not permit, in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from panfm.cli.main import app
from panfm.encoder.facts import SourceFacts, read_facts
from panfm.errors import UserError
from tests.archives import describe_source_card
from tests.encoder.test_export import SMALL, make_checkpoint


def run(*arguments: object) -> str:
    answer = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.output


def write_archive(root: Path, **changes: Any) -> Path:
    for number in range(2):
        coarse = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 72)).save(root / f"{number}.jpg")
    card = {
        "licence": "CC BY-NC 4.0", "permitted_uses": ["research", "education"], "synthetic": None, "table": None,
        "modality": "dermoscopic", "listing": ["{name}.jpg"],
    }  # fmt: skip
    (root / "card.yaml").write_text(yaml.safe_dump(describe_source_card("tiny", **(card | changes))))
    return root / "card.yaml"


def test_a_build_for_a_use_that_the_card_does_not_permit_is_refused(tmp_path: Path) -> None:
    card = write_archive(tmp_path)
    build = ("shards", "build", card, "--root", tmp_path, "--processes", "1", "--out")
    with pytest.raises(UserError, match=r"permitted_uses \(research, education\) does not include commercial"):
        run(*build, tmp_path / "out", "--use", "commercial")
    assert not (tmp_path / "out").exists()
    run(*build, tmp_path / "out", "--use", "education")
    assert json.loads((tmp_path / "out" / "index.json").read_text())["use"] == "education"
    run(*build, tmp_path / "default")
    assert json.loads((tmp_path / "default" / "index.json").read_text())["use"] == "research"
    write_archive(tmp_path, permitted_uses=["education"])  # even research is asked for
    with pytest.raises(UserError, match="does not include research"):
        run(*build, tmp_path / "none")


def test_an_export_names_the_source_and_its_licence(tmp_path: Path) -> None:
    source = SourceFacts(
        source="tiny", licence="CC BY-NC 4.0", num_kept=2, num_excluded=0, data_hash="ab", permitted_uses=("research",)
    )
    checkpoint = make_checkpoint(tmp_path / "step-1", SMALL, sources=(source,))
    with pytest.raises(UserError, match=r"tiny \(licence CC BY-NC 4\.0\), which does not permit the use commercial"):
        run("export", checkpoint, "--out", tmp_path / "out", "--use", "commercial")
    assert not (tmp_path / "out").exists()
    run("export", checkpoint, "--out", tmp_path / "out")
    assert read_facts(tmp_path / "out" / "panfm.json").use == "research"
