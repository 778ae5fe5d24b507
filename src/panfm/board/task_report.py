"""The page of one task: a TaskPage and the board that it belongs to in, HTML out that fetches nothing but ../assets.

    TaskPage --task_charts--> specs with rows --JSON--+
             --tables, words here---------------------+--> templates/task.html.j2
             --task_errors, where images are wanted---+

Made like the board's own page (`page`): escaped, offline, the same bytes for the same numbers; every drawing has its
numbers in a table, so that the page reads without a script.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from panfm.board.charts import get_series
from panfm.board.page import embed_json, join_scripts, read_asset, write_policy
from panfm.board.render import build_environment
from panfm.board.summary import LeaderboardSummary, Section, Task
from panfm.board.task_charts import build_drawings
from panfm.board.task_confusion import MIN_COUNTED_GROUPS
from panfm.board.task_curves import SPECIFICITIES
from panfm.board.task_errors import MAX_A_GROUP, ShownMistake
from panfm.board.task_pages import EVEN, EncoderDetails, TaskPage
from panfm.board.words import (
    PROTOCOLS,
    RESEARCH_ONLY,
    describe_fraction,
    describe_method,
    describe_protocol,
    describe_units,
)
from panfm.measures.subgroups import MIN_SHOWN_GROUPS, Difference, SubgroupLevel

SCRIPTS = ("drawings.js", "task.js")
NAMES = {
    "age": "age at the image, in years",
    "anatomic_site": "anatomic site",
    "confirmed_by": "how the diagnosis was confirmed",
    "phototype": "phototype (Fitzpatrick)",
}
IMAGES_WARNING = (
    "This page holds images of patients. Keep it where the shards may lie, look for faces and writing before anybody "
    "else sees it, and do not publish it."
)
NUM_DAYS = 4  # of the table of event-free shares
BENEFIT_EVERY = 10  # thresholds of the table of net benefits, in percent


@dataclass(frozen=True)
class EventFreeRow:
    """One line of the table of event-free shares: None where fewer than MIN_COUNTED_GROUPS were still followed."""

    encoder: str
    risk: str
    shares: tuple[float | None, ...]


def render_task_page(
    summary: LeaderboardSummary, page: TaskPage, shown: Mapping[str, Sequence[ShownMistake]] | None = None
) -> str:
    """Render the page that the board links to as tasks/TASK.html; its drawings need ../assets/vega.js.

    shown: each encoder's surest mistakes with their images, None where no images are wanted.
    """
    series = get_series(summary)
    drawings = build_drawings(page, series)
    script = join_scripts(read_asset(name) for name in SCRIPTS)
    days = list_days(page)
    html = (
        build_environment()
        .get_template("task.html.j2")
        .render(
            page=page,
            task=page.task,
            series=series,
            sections=_find_sections(summary, page.task),
            drawings=drawings,
            data=embed_json({name: {"spec": one.spec, "data": one.data} for name, one in drawings.items()}),
            script=Markup(script),  # noqa: S704, our own files
            policy=write_policy(script),
            specificities=SPECIFICITIES,
            benefits=list_benefits(page.encoders),
            days=days,
            event_free=[row for one in page.encoders for row in list_event_free(one, days)],
            shown_mistakes=shown,
            images_warning=IMAGES_WARNING,
            max_a_group=MAX_A_GROUP,
            attributes=_list_attributes(page),
            attribute_names=NAMES,
            protocol_titles=PROTOCOLS,
            research_only=RESEARCH_ONLY,
            metric_titles={line.name: line.title for one in page.encoders for line in one.metrics},
            min_shown=MIN_SHOWN_GROUPS,
            min_counted=MIN_COUNTED_GROUPS,
            describe_counts=describe_counts,
            describe_difference=describe_difference,
            describe_fraction=describe_fraction,
            describe_method=describe_method,
            describe_protocol=describe_protocol,
            describe_threshold=describe_threshold,
            describe_units=describe_units,
            hush=hush,
            is_hidden=is_hidden,
            list_case_mix=list_case_mix,
        )
    )
    return html.rstrip() + "\n"


def list_benefits(encoders: Sequence[EncoderDetails]) -> dict[str, Any] | None:
    """The decision curves at every tenth threshold: {thresholds [T], all [T], rows: [(encoder, curve values [T])]}."""
    curves = [(one.encoder, one.curve) for one in encoders if one.curve is not None]
    if not curves:
        return None
    first = curves[0][1]
    places = [
        place
        for place, threshold in enumerate(first.thresholds.tolist())
        if round(100 * threshold) % BENEFIT_EVERY == 0
    ]

    def take(values: Any) -> list[float | None]:
        return [None if values is None else float(values[place]) for place in places]

    return {
        "thresholds": take(first.thresholds),
        "all": take(first.treat_all),
        "rows": [
            (name, list(zip(take(one.net_benefit), take(one.low), take(one.high), strict=True))) for name, one in curves
        ],
    }


def list_days(page: TaskPage) -> tuple[int, ...]:
    """Days of the table of event-free shares: a quarter, half, ... of the longest follow-up."""
    sides = [side for one in page.encoders if one.follow_up for side in (one.follow_up.low, one.follow_up.high) if side]
    if not sides:
        return ()
    last = max(float(side.times[-1]) for side in sides)
    return tuple(round(last * quarter / NUM_DAYS) for quarter in range(1, NUM_DAYS + 1))


def list_event_free(details: EncoderDetails, days: Sequence[int]) -> list[EventFreeRow]:
    """Read both curves of an encoder on the given days."""
    found = details.follow_up
    if found is None or found.low is None or found.high is None:
        return []
    rows = []
    for risk, curve in (("low risk", found.low), ("high risk", found.high)):
        followed = [float(curve.at_risk[curve.times >= day].max(initial=0)) for day in days]
        shares = curve.read(days).tolist()
        kept = tuple(share if num >= MIN_COUNTED_GROUPS else None for share, num in zip(shares, followed, strict=True))
        rows.append(EventFreeRow(details.encoder, risk, kept))
    return rows


def describe_threshold(details: EncoderDetails) -> str:
    """Say which threshold the subgroup tables of an encoder use."""
    if details.common is None or details.common.value is None:
        return f"{EVEN:g}, the more probable class, as no threshold was chosen in training"
    return (
        f"{details.common.value:.3f}, chosen on out-of-fold training scores for {details.common.wanted:.0%} "
        f"{details.common.side}"
    )


def describe_difference(difference: Difference | None) -> str:
    """Say a level's difference to the reference and whether chance explains it."""
    if difference is None:
        return "reference"
    if difference.value is None:
        return "not compared"
    value = f"{difference.value:+.3f}".replace("-", "−")
    if difference.p_adjusted is None:
        return value
    return f"{value}, p {'< 0.01' if difference.p_adjusted < 0.01 else f'= {difference.p_adjusted:.2f}'}"


def is_hidden(level: SubgroupLevel) -> bool:
    """Whether a level has so few groups that nothing of it is shown, its counts neither."""
    return level.num_positive_groups < MIN_SHOWN_GROUPS and level.num_negative_groups < MIN_SHOWN_GROUPS


def hush(reason: str | None) -> str:
    """Say why something is not shown without the number of groups that are too few."""
    return re.sub(r"not shown: \d+ ", f"not shown: fewer than {MIN_SHOWN_GROUPS} ", reason or "").replace(
        f", at least {MIN_SHOWN_GROUPS} are needed", ""
    )


def describe_counts(num_images: int, num_groups: int) -> str:
    """Count the images of a class in a level, and their groups; few of them could point at a patient."""
    return (
        f"{num_images} ({num_groups})" if num_groups >= MIN_SHOWN_GROUPS else f"in fewer than {MIN_SHOWN_GROUPS} groups"
    )


def list_case_mix(level: SubgroupLevel) -> list[str]:
    """Say what a level is made of: for each other attribute its commonest value and share."""
    texts = []
    for column, shares in level.case_mix.items():
        value, share = min(shares.items(), key=lambda item: (-item[1], item[0]))
        texts.append(f"{column.replace('_', ' ')}: {value.replace('_', ' ')} {share:.0%}")
    return texts


def _find_sections(summary: LeaderboardSummary, task: Task) -> list[tuple[Section, int]]:
    """Every section that has the task, with its place there."""
    return [
        (section, place)
        for section in summary.sections
        for place, one in enumerate(section.tasks)
        if one.slug == task.slug
    ]


def _list_attributes(page: TaskPage) -> list[str]:
    """The attributes with a table, in the order of the first encoder's."""
    return list(dict.fromkeys(name for one in page.encoders for name in (*one.subgroups, *one.shares)))
