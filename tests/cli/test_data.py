"""`panfm data preview` as a user meets it: a picture and a table, or one clear line."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from panfm.cli.data import preview
from panfm.cli.main import app
from panfm.errors import UserError
from panfm.shards.packing import BuildOptions
from panfm.shards.writer import build_shards
from tests.archives import make_source_card


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight dermoscopic images of four patients, as a shard set."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "patient"))
        for number in range(8):
            coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
            coarse.resize((96, 72), Image.Resampling.BICUBIC).save(root / f"{number}.jpg")
            writer.writerow((f"{number}.jpg", f"Erika Mustermann {number // 2}"))
    card = make_source_card("tiny", modality="dermoscopic", columns={"path": "path", "patient_id": "patient"})
    build_shards(card, root, root / "shards", options=BuildOptions())
    return root / "shards"


def test_preview_writes_a_picture_and_prints_a_table(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "page.png"
    preview("debug_cpu", [f"data.shards=[{shards}]", "augment.views=2"], out=path, per_modality=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["source/modality", "samples", "share"]
    assert lines[1].startswith("tiny/dermoscopic  8        100.0%  0.3 to 1    brightness ± 20 %")
    assert lines[1].endswith("random 0.75, 48 of 8 x 8 patches")
    assert lines[2:] == ["no samples: clinical, total_body, histopathology", str(path)]
    with Image.open(path) as page:
        assert page.format == "PNG" and page.width > 1000 and page.height > 600


def test_what_a_user_gets_wrong_is_one_clear_line(shards: Path, tmp_path: Path) -> None:
    here = f"data.shards=[{shards}]"
    for config, overrides, said in (
        ("no_such_config", [], "no_such_config: no such file"),
        ("debug_cpu", [f"data.shards=[{tmp_path}/none]"], "none: no such folder; build it"),
        ("debug_cpu", [here, "data.modalities=[total_body]"], "nothing is left to draw"),
        ("debug_cpu", [here, "augment.image_size=60"], "must equal encoder.image_size"),
        ("debug_cpu", [here, "augment.stains=0.1"], "unknown key augment.stains"),
    ):
        with pytest.raises(UserError) as error:
            preview(config, overrides, out=tmp_path / "page.png")
        assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "page.png").exists()


def test_the_command_is_known_and_shows_an_example() -> None:
    shown = CliRunner().invoke(app, ["data", "preview", "--help"])
    assert shown.exit_code == 0 and "Example: panfm data preview debug_cpu augment.views=2" in shown.output
