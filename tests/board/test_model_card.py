"""The card says what was recorded and measured, in the board's numbers; what is not there is marked and counted."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from panfm.board.reports.counts import UNKNOWN, Count, count_levels
from panfm.board.reports.document import NO_DIAGNOSIS, NOT_RECORDED, describe_blanks, render_html, render_markdown
from panfm.board.reports.model_card import build_model_card
from panfm.board.reports.model_card_facts import CardFacts, collect_facts, flatten_config
from panfm.board.words import describe_cell
from panfm.cli.main import app
from panfm.encoder import load_encoder
from panfm.encoder.export import export_encoder
from panfm.encoder.facts import SourceFacts
from panfm.errors import UserError
from panfm.shards.index import ShardSet
from tests.board.fabricated import GOOD, RANDOM, write_trial
from tests.board.test_task_pages import NUM_GROUPS, make_levels
from tests.encoder.test_export import SMALL, make_checkpoint

EVIL = "<script>alert(1)</script>"
SOURCES = (
    SourceFacts(source="clinic", licence="CC0 1.0", num_kept=900, num_excluded=30, data_hash="ab",
                permitted_uses=("research", "commercial")),
    SourceFacts(source="atlas", licence="CC BY-NC 4.0", num_kept=100, num_excluded=0, data_hash="cd",
                permitted_uses=("research",)),
)  # fmt: skip
CONFIG = {
    "data": {"shards": ["/secret/archive/clinic", "atlas"]},
    "objectives": [{"target": {"address": "timm:vit_tiny_patch16_224@/secret/weights/w.safetensors"}}],
    "tracking": {"entity": "A. Person"},
    "optim": {"lr": 0.5, "decay": None},
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    checkpoint = make_checkpoint(folder / "step-1", SMALL, sources=SOURCES, config=CONFIG, energy_kwh=None)
    return export_encoder(checkpoint, folder / "skin")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, export: Path) -> Path:
    root = tmp_path_factory.mktemp("card_results") / "results"
    own = load_encoder(f"panfm:{export}").hash
    for encoder, strength in ((GOOD, 1.5), (RANDOM, 0.3)):
        hashed = own if encoder == GOOD else None
        more = {"num_groups": NUM_GROUPS, "subgroups": make_levels(), "encoder_hash": hashed}
        write_trial(root, encoder, "lesions", strength, **more)
        write_trial(root, encoder, "lesions", strength, fraction=0.1, **more)
        write_trial(root, encoder, EVIL, strength, classes=4, **more)
    return root


@pytest.fixture(scope="module")
def found(export: Path, results: Path) -> CardFacts:
    return collect_facts(f"panfm:{export}", [results])


def test_every_result_is_the_boards(found: CardFacts) -> None:
    summary = found.summary
    assert summary is not None
    text = render_markdown(build_model_card(found)).replace("\\", "")
    shown = 0
    for section in summary.sections:
        for row in section.rows:  # the encoder's own numbers and those of random weights beside it
            for cell in row.cells:
                if cell.num_runs:
                    assert f"| {describe_cell(cell)} |" in text
                    shown += 1
    assert shown == 6
    ours = next(row for row in summary.sections[0].rows if row.encoder.name == GOOD)
    gap = ours.cells[0].difference
    assert gap is not None and gap.difference is not None and f"+{gap.difference:.3f} [" in text


def test_the_front_matter_is_what_the_hub_reads(found: CardFacts) -> None:
    text = render_markdown(build_model_card(found))
    assert text.startswith("---\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other" and front["license_name"] == NOT_RECORDED
    assert (front["library_name"], front["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert front["datasets"] == ["clinic", "atlas"]
    (index,) = front["model-index"]
    assert index["name"] == GOOD
    assert len(index["results"]) == 2  # of each protocol the most labels
    for result in index["results"]:
        assert result["task"]["type"] == "image-classification" and result["dataset"]["type"]
        (metric,) = result["metrics"]
        assert isinstance(metric["value"], float) and "95 % interval" in metric["name"]
    cells = [cell for cell in found.standings[0].row.cells if cell.num_runs]
    assert [round(cell.value or 0, 6) for cell in cells] == [one["metrics"][0]["value"] for one in index["results"]]


def test_a_licence_that_the_hub_knows_is_named_as_it_does(found: CardFacts) -> None:
    one = found.standings[0]
    card = one.row.encoder.model_copy(update={"licence": "CC-BY-NC-4.0"})
    known = replace(found, standings=(replace(one, row=replace(one.row, encoder=card)),))
    front = yaml.safe_load(build_model_card(known).front.split("---\n")[1])
    assert front["license"] == "cc-by-nc-4.0" and "license_name" not in front


def test_blanks_are_marked_and_counted(found: CardFacts, export: Path) -> None:
    document = build_model_card(found)
    page = render_html(document)
    assert f"Blanks: {len(document.blanks)} (" in page and len(document.blanks) > 5
    assert page.count('class="blank"') == len(document.blanks)
    assert "Training: Energy" in document.blanks and "Training: Processor hours" in document.blanks
    assert describe_blanks(document) in render_markdown(document).replace("\\", "")
    assert found.facts is not None
    fuller = replace(found, facts=found.facts.model_copy(update={"energy_kwh": 1.25}))
    assert len(build_model_card(fuller).blanks) == len(document.blanks) - 1
    assert "1.25 kWh" in render_html(build_model_card(fuller))
    bare = build_model_card(collect_facts(f"panfm:{export}"))
    assert any(blank.startswith("Results: not measured") for blank in bare.blanks)
    assert "panfm evaluate run" in render_markdown(bare)


def test_licences_and_what_they_permit(found: CardFacts) -> None:
    text = render_markdown(build_model_card(found))
    assert "| clinic | CC0 1.0 | permitted | not permitted | permitted |" in text
    assert "| atlas | CC BY-NC 4.0 | permitted | not permitted | not permitted |" in text
    assert "All sources permit: research." in text
    assert "| CC BY-NC 4.0 | 100 | 10 % |" in text


def test_limits_follow_from_the_facts(found: CardFacts) -> None:
    text = render_markdown(build_model_card(found))
    assert "90 % of the training images are of one source, clinic." in text
    assert "No audit was held against its training data" in text
    assert "It was not measured beside random weights" not in text
    alone = replace(found, standings=tuple(replace(one, baseline=None) for one in found.standings))
    assert "It was not measured beside random weights" in render_markdown(build_model_card(alone))


def test_it_always_says_that_it_is_no_diagnosis(found: CardFacts, tmp_path: Path) -> None:
    random = collect_facts("timm:test_vit@random:0")
    for facts in (found, random):
        document = build_model_card(facts)
        assert NO_DIAGNOSIS in render_html(document) and NO_DIAGNOSIS in render_markdown(document)
    assert "panfm did not train it" in render_markdown(build_model_card(random))


def test_small_groups_are_not_shown(found: CardFacts) -> None:
    text = render_markdown(build_model_card(found))
    toe = next(line for line in text.splitlines() if line.startswith("| toe |"))  # 8 groups
    assert "fewer than 20 groups" in toe and not re.search(r"\d\.\d{3}", toe)
    assert re.search(r"\| arm.* 0\.\d{3}", text)


def test_a_hidden_count_cannot_be_worked_out() -> None:
    groups = [f"p{number}" for number in range(200)]
    levels = ["a"] * 100 + ["b"] * 60 + ["c"] * 10 + [None] * 30
    counts = {one.level: one for one in count_levels(levels, groups)}
    assert counts["a"] == Count("a", 100, 100) and counts["b"].num_images == 60
    assert counts[UNKNOWN].num_images is None and counts["c"].num_images is None  # 200 - 100 - 60 - 30 would be it
    levels = ["a"] * 100 + ["b"] * 90 + ["c", "d"] * 5  # c and d are ten together, which the total would tell
    tiny = {one.level: one.num_images for one in count_levels(levels, groups)}
    assert tiny == {"a": 100, "b": None, "c": None, "d": None}
    levels = ["a"] * 100 + ["b"] * 60 + ["c"] * 10 + [None] * 30
    few_unknown = {one.level: one.num_images for one in count_levels(["a"] * 190 + [None] * 10, groups)}
    assert few_unknown == {"a": 190, UNKNOWN: None}
    assert [one.level for one in count_levels(levels, groups, order=("c", "a"))] == ["c", "a", "b", UNKNOWN]
    images = count_levels(["a"] * 50 + ["b"] * 50, ["p1"] * 50 + [f"q{number}" for number in range(50)])
    assert all(one.num_images is None for one in images)  # fifty images of one patient


def test_shards_are_counted_and_matched(export: Path, clinic: ShardSet, tmp_path: Path) -> None:
    own = replace_source(export, tmp_path, clinic.compute_data_hash())
    document = build_model_card(collect_facts(f"panfm:{own}", shards=[clinic.path]))
    text = render_markdown(document)
    assert "72 images; kind of source: not recorded" in text
    assert "These are the images it was trained on" in text
    assert "| modality | clinical | 72 images of 36 patients |" in text
    assert "skin type is not known of any image" in text
    other = render_markdown(build_model_card(collect_facts(f"panfm:{export}", shards=[clinic.path])))
    assert "Not the images that the encoder's facts name" in other


def replace_source(export: Path, folder: Path, data_hash: str) -> Path:
    """The same export whose facts name a source with this data hash."""
    copy = folder / "copy"
    copy.mkdir()
    for name in ("model.safetensors", "config.json"):
        (copy / name).write_bytes((export / name).read_bytes())
    facts = json.loads((export / "panfm.json").read_text())
    facts["sources"][0]["data_hash"] = data_hash
    (copy / "panfm.json").write_text(json.dumps(facts))
    return copy


def test_names_stay_text_and_folders_stay_at_home(found: CardFacts) -> None:
    document = build_model_card(found)
    page, text = render_html(document), render_markdown(document)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "<script" not in text.split("---\n", 2)[2]
    for secret in ("/secret", "A. Person", str(found.description.address.partition(":")[2])):
        assert secret not in page and secret not in text
    assert ("data.shards", "clinic, atlas") in flatten_config(CONFIG)
    assert ("optim.decay", "default") in flatten_config(CONFIG)


def test_the_command_writes_the_same_bytes_twice(export: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_trial(results, GOOD, "lesions", 1.5, encoder_hash=load_encoder(f"panfm:{export}").hash)
    for name in ("one", "two"):
        arguments = ["report", f"panfm:{export}", "--results", str(results), "--out", str(tmp_path / name)]
        done = CliRunner().invoke(app, [*arguments, "--processes", "1"])
        assert done.exit_code == 0, done.output
        assert "Blanks: " in done.output
    for name in ("model_card.md", "model_card.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_results_of_other_encoders_are_refused(export: Path, tmp_path: Path) -> None:
    write_trial(tmp_path / "results", "another", "lesions", 1.0)
    with pytest.raises(UserError, match=r"no Result is of this encoder .* those there are of another"):
        collect_facts(f"panfm:{export}", [tmp_path / "results"])


@pytest.mark.parametrize("arguments", [["--paper", "a", "--privacy", "b"], [], ["one", "two"]])
def test_one_report_at_a_time(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["report", *arguments])
    assert done.exit_code != 0 and isinstance(done.exception, UserError | SystemExit)
    assert "panfm report ENCODER" in str(done.exception) or "one report at a time" in str(done.exception) or done.output
