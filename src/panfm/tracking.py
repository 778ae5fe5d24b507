"""What a run leaves to look at: metrics.jsonl always, loss.png, and wandb where the config asks for it.

    record of a step (plain numbers)  ->  run/metrics.jsonl  ->  run/loss.png
                                      ->  wandb (offline in run/wandb, online, or disabled)

Only rank 0 calls this module. Numbers that are not finite are written as null.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from panfm.config import config_class
from panfm.errors import UserError
from panfm.files import open_atomic, write_bytes

Record = dict[str, Any]
CURVE_SIZE = (900, 480)  # pixels
CURVE_MARGIN = (80, 40, 30, 60)  # pixels: left, top, right, bottom
SMOOTHING_SHARE = 0.02  # width of the running mean as a share of the run


@config_class
class TrackingConfig:
    """What is written down, and how often."""

    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Offline writes into the run folder only (`wandb sync` sends it later); online sends metrics and the config."""
    project: str = "panfm"
    """wandb project."""
    name: str | None = None
    """wandb run name; by default the name of the run folder."""
    co2_g_per_kwh: float | None = Field(default=473.0, ge=0)
    """Grams of CO2 a kilowatt-hour, for co2_kg in metrics.jsonl: set your grid's, cooling included if you know it. The
    default is the world's mean of 2024 (Ember, Global Electricity Review 2025); null: no co2_kg."""


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a JSON-lines file; numbers that are not finite become null."""
    clean = {key: _finite_or_none(value) for key, value in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, allow_nan=False) + "\n")


def describe_record(record: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a record that a live view shows, name -> text; "-" for what is not known."""
    formats = {
        "loss": ("loss", "{:.4f}"),
        "lr": ("lr", "{:.2e}"),
        "images_per_second": ("images/s", "{:.1f}"),
        "data_wait_share": ("data wait", "{:.1%}"),
        "mfu": ("MFU", "{:.1%}"),
        "memory_gib": ("memory", "{:.1f} GiB"),
        "energy_kwh": ("energy", "{:.3g} kWh"),
    }
    values = {name: (record.get(key), text) for key, (name, text) in formats.items()}
    return {name: "-" if value is None else text.format(value) for name, (value, text) in values.items()}


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records: list[Record] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON; remove the line, or the file") from None
    return records


def trim_metrics(path: Path, step: int) -> None:
    """Drop the records after `step`: a run resumed there will write them again."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    with open_atomic(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


def write_loss_curve(metrics: Path, path: Path, title: str) -> None:
    """Draw the losses of a metrics.jsonl over samples_seen as a PNG: every record thin, a running mean thick."""
    points = [(r["samples_seen"], r["loss"]) for r in read_metrics(metrics) if r.get("loss") is not None]
    if len(points) < 2:
        return
    from io import BytesIO

    buffer = BytesIO()
    draw_curve([x for x, _ in points], [y for _, y in points], title=title).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def draw_curve(x: Sequence[float], y: Sequence[float], *, title: str) -> Image.Image:
    """Draw loss `y` over samples `x` (rising, two points or more) on axes with round ticks."""
    left, top, right, bottom = CURVE_MARGIN
    width, height = CURVE_SIZE
    x_ticks, y_ticks = compute_ticks(x[0], x[-1]), compute_ticks(min(y), max(y))
    x_low, x_high = min(x[0], x_ticks[0]), max(x[-1], x_ticks[-1])
    y_low, y_high = min(*y, y_ticks[0]), max(*y, y_ticks[-1])

    def place(sample: float, loss: float) -> tuple[float, float]:
        across = (sample - x_low) / ((x_high - x_low) or 1)
        up = (loss - y_low) / ((y_high - y_low) or 1)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    image = Image.new("RGB", CURVE_SIZE, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=14)
    for tick in x_ticks:
        across, down = place(tick, y_low)
        draw.line([(across, top), (across, down)], fill="#e6e6e6")
        draw.text((across, down + 8), f"{tick:,.0f}", fill="#333333", font=font, anchor="mt")
    for tick in y_ticks:
        across, down = place(x_low, tick)
        draw.line([(across, down), (width - right, down)], fill="#e6e6e6")
        draw.text((across - 8, down), f"{tick:.4g}", fill="#333333", font=font, anchor="rm")
    draw.text((left, top - 12), title, fill="#000000", font=font, anchor="lb")
    draw.text((width - right, height - 8), "samples seen", fill="#333333", font=font, anchor="rb")
    draw.line([place(*point) for point in zip(x, y, strict=True)], fill="#b7c9e2", width=1)
    smooth = compute_running_mean(y, max(round(len(y) * SMOOTHING_SHARE), 1))
    draw.line([place(*point) for point in zip(x, smooth, strict=True)], fill="#1f4e9c", width=3)
    return image


def compute_ticks(low: float, high: float, num_wanted: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    span = (high - low) or abs(high) or 1.0
    raw = span / num_wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    distance = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    first = math.ceil(low / distance)
    ticks = [number * distance for number in range(first, math.floor(high / distance) + 1)]
    return ticks or [low]


def compute_running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at every place (of fewer at the start)."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(i + 1 - width, 0)]) / min(i + 1, width) for i in range(len(values))]


@contextmanager
def open_wandb(config: TrackingConfig, run: Path, settings: Mapping[str, Any]) -> Iterator[Callable[[Record], None]]:
    """A wandb run for the length of a `with`; yields a function that logs one record under its step.

    A value that is a Pillow image is shown as one. Everything that wandb writes stays under `run`/wandb: its caches and
    settings too, which it would else keep in the home folder. A resumed run folder continues its wandb run. With
    `disabled` nothing is imported.
    """
    if config.wandb == "disabled":
        yield lambda record: None
        return
    folder = (run / "wandb").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ.setdefault(variable, str(folder / "local"))
    import wandb

    identity = folder / "run_id.txt"
    if not identity.exists():
        write_bytes(identity, uuid4().hex[:8].encode())
    session = wandb.init(
        project=config.project,
        name=config.name or run.resolve().name,
        id=identity.read_text(encoding="utf-8"),
        resume="allow" if config.wandb == "online" else None,
        mode=config.wandb,
        dir=str(run),
        config=dict(settings),
        settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, x_disable_stats=True),
    )
    # The record's own step is the axis: wandb's may not go back, as a resumed run and a rollback do.
    session.define_metric("*", step_metric="step")

    def log(record: Record) -> None:
        values = {key: value for key, value in record.items() if value is not None}
        for key, value in values.items():
            if isinstance(value, Image.Image):
                values[key] = wandb.Image(value)
        session.log(values)

    try:
        yield log
    finally:
        session.finish()


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
