"""A folder of images is the same images to `panfm predict`, `panfm select` and `panfm embed`."""

import os
from pathlib import Path

import pytest

from panfm import file_features
from panfm.clinic.images import find_images
from panfm.errors import UserError
from panfm_predict.files import SUFFIXES, list_images

NAMES = ["b.jpg", "A.PNG", "deep/er/c.webp", "deep/d.avif", "deep/a.gif", "._b.jpg", ".trash/e.jpg", "notes.txt", "jpg"]


def test_all_commands_find_the_same_images(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(number))
    found = list_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "A.PNG", "b.jpg", "deep/a.gif", "deep/d.avif", "deep/er/c.webp",
    ]  # fmt: skip
    assert file_features.SUFFIXES == SUFFIXES
    assert file_features.list_images([tmp_path]).paths == tuple(found) == find_images([tmp_path]).paths


def test_a_folder_inside_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.jpg").write_text("")
    original = os.scandir

    def scan(path: Path | str) -> object:  # whoever runs the tests may be allowed to read everything
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(PermissionError):
        list_images(tmp_path)
    for search in (find_images, file_features.list_images):
        with pytest.raises(UserError, match=r"locked: cannot be read \(Permission denied\); check who may read it"):
            search([tmp_path])
