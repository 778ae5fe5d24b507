"""The drawings of a task's page as plain numbers: reliability, decision and survival curves, as in `charts`.

x is in percent of the drawing's width and y in pixels from the top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from panfm.board.charts import Tick, choose_axis, label_tick
from panfm.board.task_pages import EncoderDetails
from panfm.measures.calibration import ReliabilityBin
from panfm.measures.survival import StepCurve

RELIABILITY_HEIGHT = 170  # pixels between 0 and 1
CURVE_HEIGHT = 200  # pixels between the lowest and the highest grid line
LOWEST_BENEFIT = -0.05  # below, treating everybody falls out of every useful scale


@dataclass(frozen=True)
class ReliabilityPoint:
    """A bin: its mean confidence and the share that was right, with the interval of the latter."""

    x: float
    y: float
    y_low: float | None
    y_high: float | None
    text: str


@dataclass(frozen=True)
class CurveLine:
    """Net benefit over threshold probabilities; encoder None: treating everybody."""

    encoder: str | None
    series: int | None
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class CurvePlot:
    """The decision curves of all encoders on one scale."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    zero: float  # y of treating nobody
    lines: tuple[CurveLine, ...]


@dataclass(frozen=True)
class FollowUpPlot:
    """Two curves of one encoder: the share of patients without the event by day, at low and at high risk."""

    encoder: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    low: tuple[tuple[float, float], ...]
    high: tuple[tuple[float, float], ...]


def draw_follow_up(details: EncoderDetails) -> FollowUpPlot | None:
    """Draw the Kaplan-Meier curves on both sides of the cut-off; None where they are not shown."""
    found = details.follow_up
    if found is None or found.low is None or found.high is None:
        return None
    last = float(max(found.low.times[-1], found.high.times[-1]))

    def place(curve: StepCurve) -> tuple[tuple[float, float], ...]:
        corners, value = [(0.0, 1.0)], 1.0
        for day, after in zip(curve.times.tolist(), curve.values.tolist(), strict=True):
            if after != value or day == curve.times[-1]:  # down at the event, or along to the end of follow-up
                corners += [(day, value), (day, after)]
                value = after
        return tuple((round(100 * day / last, 2), round(CURVE_HEIGHT * (1 - share), 1)) for day, share in corners)

    return FollowUpPlot(
        encoder=details.encoder,
        x_ticks=tuple(Tick(20.0 * step, f"{last * step / 5:.0f}") for step in range(6)),
        y_ticks=tuple(Tick(round(CURVE_HEIGHT * (1 - step / 4), 1), f"{25 * step} %") for step in range(5)),
        low=place(found.low),
        high=place(found.high),
    )


def draw_reliability(table: Sequence[ReliabilityBin]) -> tuple[ReliabilityPoint, ...]:
    """Place the bins of a reliability table in a square from 0 to 1; on the diagonal it keeps what it promises."""

    def locate(value: float) -> float:
        return round(RELIABILITY_HEIGHT * (1 - value), 1)

    return tuple(
        ReliabilityPoint(
            x=round(100 * one.confidence, 2),
            y=locate(one.right.value or 0.0),
            y_low=None if one.right.low is None else locate(one.right.low),
            y_high=None if one.right.high is None else locate(one.right.high),
            text=f"said {one.confidence:.2f}, was {one.right.value:.2f} ({one.num_images} scored)",
        )
        for one in table
    )


def draw_curves(encoders: Sequence[EncoderDetails], series: Mapping[str, int]) -> CurvePlot | None:
    """Draw the decision curves of all encoders that have one; None where none has."""
    curves = [(one.encoder, one.curve) for one in encoders if one.curve is not None]
    if not curves:
        return None
    first = curves[0][1]
    values = [float(value) for _, curve in curves for value in curve.net_benefit]
    low, high, ticks = choose_axis([max(LOWEST_BENEFIT, value) for value in [0.0, first.treat_all.max(), *values]])
    last = float(first.thresholds.max())

    def place(thresholds: Sequence[float], benefits: Sequence[float]) -> tuple[tuple[float, float], ...]:
        return tuple(
            (round(100 * threshold / last, 2), round(CURVE_HEIGHT * (high - benefit) / (high - low), 1))
            for threshold, benefit in zip(thresholds, benefits, strict=True)
            if benefit >= low
        )

    lines = [CurveLine(None, None, place(first.thresholds.tolist(), first.treat_all.tolist()))]
    lines += [
        CurveLine(name, series[name], place(curve.thresholds.tolist(), curve.net_benefit.tolist()))
        for name, curve in curves
    ]
    return CurvePlot(
        x_ticks=tuple(Tick(round(100 * step / 5, 2), f"{100 * last * step / 5:.0f} %") for step in range(6)),
        y_ticks=tuple(
            Tick(round(CURVE_HEIGHT * (high - value) / (high - low), 1), label_tick(value, ticks)) for value in ticks
        ),
        zero=round(CURVE_HEIGHT * high / (high - low), 1),
        lines=tuple(lines),
    )
