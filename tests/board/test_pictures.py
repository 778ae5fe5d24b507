"""Pictures of features: a plain decomposition, no keys leave, few stay grey, images only where they are asked for."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from panfm.board.reports.document import render_html
from panfm.board.reports.neighbours import WARNING, choose_queries, find_neighbours, write_neighbours
from panfm.board.reports.pictures import (
    OTHER,
    Points,
    build_pictures,
    check_umap,
    collect_points,
    draw_points,
    merge_few,
    project_pca,
    project_umap,
)
from panfm.cli.main import app
from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError
from panfm.shards.index import ShardSet

ADDRESS = "timm:test_vit@random:0"
EVIL = "<script>alert(1)</script>"
HAS_UMAP = importlib.util.find_spec("umap") is not None


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(ADDRESS)


@pytest.fixture(scope="module")
def points(encoder: Encoder, clinic: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Points:
    return collect_points(encoder, [clinic], num_points=60, seed=0, cache_dir=tmp_path_factory.mktemp("cache"))


def test_points_are_images_with_what_is_known_of_them(points: Points, clinic: ShardSet) -> None:
    assert len(points.groups) == 60 and len(set(points.owners)) == 60
    np.testing.assert_allclose(np.linalg.norm(points.values, axis=1), 1)
    table = clinic.table.to_pylist()
    for place, (_, row) in enumerate(points.owners):
        assert points.columns["modality"][place] == table[row]["modality"]
        assert points.columns["label diagnosis"][place] == dict(table[row]["labels"]).get("diagnosis")
        assert points.groups[place].endswith(table[row]["group_id"])


def test_pca_is_the_plain_decomposition(points: Points) -> None:
    places = project_pca(points.values).places
    theirs = PCA(2, svd_solver="full").fit(points.values)
    expected = theirs.transform(points.values)
    for axis in range(2):
        same = np.abs(places[:, axis] - expected[:, axis]).max()
        turned = np.abs(places[:, axis] + expected[:, axis]).max()
        assert min(same, turned) < 1e-3
    said = " and ".join(f"{100 * share:.0f} %" for share in theirs.explained_variance_ratio_)
    assert said in project_pca(points.values).note
    np.testing.assert_array_equal(project_pca(points.values).places, places)


def test_few_are_grey() -> None:
    groups = np.array([f"p{number}" for number in range(70)] + ["p0"] * 30)
    levels = ["a"] * 40 + ["b"] * 20 + ["c"] * 10 + ["d"] * 30  # d: thirty images of one patient
    shown = merge_few(levels, groups)
    assert [shown.count(name) for name in ("a", "b", OTHER)] == [40, 20, 40]
    many = [f"l{number // 20:02d}" for number in range(240)]
    assert len(set(merge_few(many, np.arange(240).astype(str)))) == 9  # eight colours, and the grey


def test_coordinates_leave_without_keys(points: Points, clinic: ShardSet) -> None:
    levels = [EVIL if place % 2 else "plain" for place in range(len(points.groups))]
    figure = draw_points(project_pca(points.values), "label diagnosis", levels)
    rows = list(csv.DictReader(figure.csv.splitlines()))
    assert list(rows[0]) == ["x", "y", "level"] and len(rows) == 60
    xs = [float(row["x"]) for row in rows]
    assert xs == sorted(xs)  # not the order of the shard set
    keys = clinic.table["key"].to_pylist() + clinic.table["group_id"].to_pylist()
    assert not any(key in figure.csv or key in figure.svg for key in keys)
    assert "<script" not in figure.svg and "&lt;script" in figure.svg


def test_the_page_draws_what_has_levels_and_says_what_has_none(encoder: Encoder, points: Points) -> None:
    columns = {**points.columns, "institution": tuple("NS"[place % 2] for place in range(60))}
    groups = np.arange(60).astype(str)
    document = build_pictures(
        encoder, Points(points.values, groups, points.owners, columns), [project_pca(points.values)]
    )
    names = {figure.name for figure in document.figures}
    assert "pca-institution" in names and "pca-modality" not in names and "pca-phototype" not in names
    page = render_html(document)
    assert "all clinical" in page and "no level has enough patients" in page and "For research" in page


def test_neighbours_are_the_nearest_of_other_groups(points: Points) -> None:
    queries = list(range(0, 60, 7))
    nearest = find_neighbours(points, queries, 4)
    for query, places in zip(queries, nearest, strict=True):
        others = np.flatnonzero(points.groups != points.groups[query])
        similarity = points.values[others] @ points.values[query]
        best = others[np.argsort(-similarity)[:4]]
        assert set(places.tolist()) == set(best.tolist())
    own = Points(points.values[:3], np.array(["a", "a", "b"]), points.owners[:3], {})
    assert find_neighbours(own, [0], 2).tolist() == [[2, -1]]


def test_chosen_images_lead_the_sheet(encoder: Encoder, clinic: ShardSet, tmp_path: Path) -> None:
    keys = clinic.table["key"].to_pylist()[5:7]
    found = collect_points(encoder, [clinic], num_points=20, seed=0, keys=keys, cache_dir=tmp_path)
    queries = choose_queries(found, [clinic], 12, 0, keys)
    assert [found.owners[place][1] for place in queries] == [5, 6]
    path = write_neighbours(found, [clinic], queries, 3, tmp_path / "sheet", EVIL)
    page = path.read_text()
    assert page.count("data:image/jpeg") == 2 * 4 and WARNING in page
    assert "<script" not in page and not any(key in page for key in clinic.table["key"].to_pylist())
    with pytest.raises(UserError, match="no image of these shard sets has this key"):
        collect_points(encoder, [clinic], num_points=20, seed=0, keys=["nobody"], cache_dir=tmp_path)
    with pytest.raises(UserError, match="no image drawn here has this label"):
        collect_points(encoder, [clinic], num_points=20, seed=0, labels=["stage"], cache_dir=tmp_path)


def test_images_are_shown_on_demand_only_and_bytes_repeat(clinic: ShardSet, tmp_path: Path) -> None:
    command = ["report", "--pictures", ADDRESS, "--shards", str(clinic.path), "--num", "60"]
    command += ["--cache", str(tmp_path / "cache")]
    trees = []
    for name, more in (("one", []), ("two", []), ("three", ["--images"])):
        done = CliRunner().invoke(app, [*command, *more, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert (WARNING in done.output) == bool(more)
        trees.append(
            {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        )
    assert trees[0] == trees[1] and not any(b"image/jpeg" in data for data in trees[0].values())
    assert set(trees[2]) - set(trees[0]) == {"neighbours.html"}
    refused = CliRunner().invoke(app, [*command, "--query", "a", "--out", str(tmp_path / "four")])
    assert isinstance(refused.exception, UserError | SystemExit) and refused.exit_code != 0


@pytest.mark.skipif(HAS_UMAP, reason="umap-learn is installed here")
def test_without_umap_the_way_out_is_named() -> None:
    with pytest.raises(UserError, match=r"pip install 'panfm\[pictures\]'"):
        check_umap()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_UMAP, reason="needs umap-learn (extra pictures)")
def test_umap_repeats_with_its_seed() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 8)) + 6 * np.repeat(np.eye(2, 8), 30, axis=0)
    first, again = project_umap(values, 3), project_umap(values, 3)
    np.testing.assert_array_equal(first.places, again.places)
    apart = np.linalg.norm(first.places[:30].mean(axis=0) - first.places[30:].mean(axis=0))
    assert apart > first.places[:30].std() and first.places.shape == (60, 2)


def test_thumbnails_carry_no_metadata(points: Points, clinic: ShardSet, tmp_path: Path) -> None:
    import base64
    import io
    import re

    page = write_neighbours(points, [clinic], [0], 2, tmp_path, "x").read_text()
    data = re.findall(r"image/jpeg;base64,([^\"]+)", page)
    assert len(data) == 3
    for one in data:
        image = Image.open(io.BytesIO(base64.b64decode(one)))
        assert not image.getexif() and max(image.size) <= 160
