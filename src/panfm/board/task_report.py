"""The page of one task: a TaskPage and the board that it belongs to in, static HTML out.

Made like the board's own page (`report`): escaped, offline, the same bytes for the same numbers.
"""

from panfm.board.charts import get_series
from panfm.board.render import build_environment
from panfm.board.summary import LeaderboardSummary, Section, Task
from panfm.board.task_charts import CURVE_HEIGHT, RELIABILITY_HEIGHT, draw_curves, draw_follow_up, draw_reliability
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

NAMES = {
    "age": "age at the image, in years",
    "anatomic_site": "anatomic site",
    "confirmed_by": "how the diagnosis was confirmed",
    "phototype": "phototype (Fitzpatrick)",
}


def render_task_page(summary: LeaderboardSummary, page: TaskPage) -> str:
    """Render the page that the board links to as tasks/TASK.html."""
    series = get_series(summary)
    html = (
        build_environment()
        .get_template("task.html.j2")
        .render(
            page=page,
            task=page.task,
            series=series,
            sections=_find_sections(summary, page.task),
            reliability={one.encoder: draw_reliability(one.reliability) for one in page.encoders},
            reliability_height=RELIABILITY_HEIGHT,
            curves=draw_curves(page.encoders, series),
            curve_height=CURVE_HEIGHT,
            follow_ups={one.encoder: draw_follow_up(one) for one in page.encoders},
            attributes=_list_attributes(page),
            attribute_names=NAMES,
            protocol_titles=PROTOCOLS,
            research_only=RESEARCH_ONLY,
            metric_titles={line.name: line.title for one in page.encoders for line in one.metrics},
            min_shown=MIN_SHOWN_GROUPS,
            describe_counts=describe_counts,
            describe_difference=describe_difference,
            describe_fraction=describe_fraction,
            describe_method=describe_method,
            describe_protocol=describe_protocol,
            describe_threshold=describe_threshold,
            describe_units=describe_units,
            is_hidden=is_hidden,
            list_case_mix=list_case_mix,
        )
    )
    return html.rstrip() + "\n"


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
