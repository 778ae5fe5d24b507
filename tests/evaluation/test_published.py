"""Numbers of others: strict, each with what decides whether it compares, and about tasks that exist."""

from pathlib import Path

import pytest
import yaml

from panfm.config import validate
from panfm.errors import UserError
from panfm.evaluation.published import Publication, find_published, list_published, load_published
from panfm.evaluation.tasks import list_tasks, load_task

TABLE = {
    "task": "ham10000_diagnosis", "protocol": "linear_probe", "split": "theirs", "where": "table 1",
    "numbers": [{"model": "A", "metric": "auroc", "value": 0.9, "low": 0.8, "high": 0.95}],
}  # fmt: skip
PUBLICATION = {
    "version": 1,
    "name": "paper",
    "title": "Paper",
    "citation": "A. B.",
    "doi": "10.1000/x",
    "tables": [TABLE],
}


def make(**entry: object) -> dict[str, object]:
    """The publication with one number changed; None takes a key away."""
    number = {key: value for key, value in {**TABLE["numbers"][0], **entry}.items() if value is not None}
    return {**PUBLICATION, "tables": [{**TABLE, "numbers": [number]}]}


def test_numbers_are_found_by_task_and_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(PUBLICATION))
    (number,) = [(t, e) for t in load_published(path).tables for e in t.numbers]
    assert number[1].value == 0.9
    found = find_published("ham10000_diagnosis", ("panderm_notebook",))
    assert len(found) == 4 and all(number.publication.name == "panderm_notebook" for number in found)
    assert str(found[0]) == (
        "PanDerm: weighted_f1 0.922, linear_probe, the notebook's split of HAM_clean, 8,207 / 575 / 1,232 images, not "
        "ours (and not the paper's 60/20/20) [panderm_notebook: notebooks/HAM_clean_evaluation.ipynb]"
    )
    (few,) = [n for n in find_published("sd128_diagnosis") if n.entry.model == "PanDerm"]
    assert few.entry.value == 0.348 and ", 10% of the labels, " in str(few)
    assert find_published("no_such_task") == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (make(value=None, low=None, high=None), "give either value or gain"),
        (make(gain="+1 %", over="next"), "give either value or gain"),
        (make(value=None, low=None, high=None, gain="+1 %"), "over says whom the gain is over"),
        (make(low=None), "an interval has both low and high"),
        (make(value=0.99), "the value lies outside"),
        (make(model=None), "numbers.0.model is missing"),
        (make(valeu=0.9), "unknown key tables.0.numbers.0.valeu.*did you mean value"),
        ({**PUBLICATION, "doi": "doi.org/10.1"}, "doi .*String should match"),
        ({**PUBLICATION, "tables": []}, "at least 1 item"),
        ({**PUBLICATION, "tables": [TABLE, TABLE]}, "auroc of A stands 2 times; keep one"),
        ({**PUBLICATION, "tables": [{**TABLE, "task": None}]}, "says in `about` what was asked"),
        ({**PUBLICATION, "tables": [{**TABLE, "about": "melanoma"}]}, "says in `about` what was asked"),
        ({**PUBLICATION, "tables": [{**TABLE, "label_fraction": 0}]}, "greater than 0"),
        ({**PUBLICATION, "tables": [{**TABLE, "protocol": "magic"}]}, "'linear_probe', 'finetune' or 'other'"),
    ],
)
def test_what_a_publication_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        validate(Publication, values, where="test")
    assert "\n" not in str(error.value)


def test_the_name_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(PUBLICATION))
    with pytest.raises(UserError, match="name is 'paper'; it carries the name of its file, 'other'"):
        load_published(tmp_path / "other.yaml")


def test_shipped_numbers_are_about_our_tasks_and_cards_name_them() -> None:
    tasks = list_tasks()
    assert len(find_published("pad_ufes20_diagnosis")) == 1 + 21 + 4  # PanDerm's gain, DermFM-Zero's two tables
    by_task: dict[str, set[str]] = {}
    for name in list_published():
        for table in load_published(name).tables:
            if table.task is not None:
                assert table.task in tasks, f"{name}: {table.task}"
                by_task.setdefault(table.task, set()).add(name)
    for name in tasks:
        card = load_task(name)
        assert set(card.published) == by_task.get(name, set()), name
