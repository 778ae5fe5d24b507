"""Does pretraining pay? Recipes at the same wall-clock time on the same real images, measured by panfm's evaluation.

    python benchmarks/recipes.py --data FOLDER --out FOLDER [--minutes 20] [--seeds 3] [--recipes A B] [--open-test]

    recipes  --trainings in turns of seconds, thrown away-->  images a second  --minutes-->  samples that each may see
    seed x recipe  --trained on that many in a process of its own-->  export, trained.json
    encoders  --panfm.evaluation.run, development fold or test fold-->  Results and predictions
    predictions  --the same resampled patients for all-->  tables of each task's primary metric, paired differences

--data is a folder of real images: dermoscopic/ham10000 and clinical/pad_ufes20 as the shipped cards ham10000_200px and
pad_ufes20_320px read them, and weights/tf_efficientnet_lite0.imagenet1k.safetensors, the ImageNet network that teaches
and that is measured itself as `teacher`. Shards are built from it once. Test groups of all tasks are left out of every
training. Recipes, on two cores and with the same ViT:

    random            the ViT untrained
    lightly_mae       lightly's MAE example as published: float32, batches of 256 (benchmarks/lightly_mae.py)
    lightly_mae_bf16  the same code under bfloat16 autocast, batches of 64, a rate of 5e-4: how much of it is arithmetic
    mae, latent, ...  benchmarks/recipes/*.yaml, trained by `panfm pretrain`

The minutes are those of the training loop, its worker included, on an otherwise idle machine: let nothing else run
while speeds are measured, which comes first and takes two minutes a recipe. From then on only samples count: what
else the machine does, and that a run was cut and goes on from its checkpoint, changes how long it takes and not what
comes out. Reading weights, checkpoint and export are not in the budget. Give the same command again after a kill.

Recipes are chosen on development folds, which is what a run without --open-test measures. --open-test measures the test
fold, and writes down in test_opened.json when and for what; afterwards only the same recipes can be measured there, and
further seeds of them: nothing is left to choose, and each look is written down.
"""

import argparse
import datetime
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_compare import WEIGHTS, compare, compute_cells, evaluate_all, show
from recipes_train import UNTRAINED, Plan, identify, start, train_all, wait
from rows import write_rows

from panfm.evaluation.protocol import EvaluatedOn
from panfm.files import read_json, write_json

SOURCES = {
    "ham10000": ("ham10000_200px", "dermoscopic/ham10000"),
    "pad_ufes20": ("pad_ufes20_320px", "clinical/pad_ufes20"),
}
TASKS = ("ham10000_diagnosis", "ham10000_malignancy", "pad_ufes20_diagnosis", "pad_ufes20_malignancy")
RECIPES = ("random", "lightly_mae", "lightly_mae_bf16", "mae", "latent", "latent_lesion")
QUICK_RECIPES = ("random", "lightly_mae_bf16", "latent")
TURN_SECONDS = 30.0  # of each of the turns in which the speeds of recipes are measured


def open_test(plan: Plan) -> None:
    """Write down that the test fold is looked at, and for what; refuse a second look at anything but further seeds."""
    path = plan.out / "test_opened.json"
    asked = {
        "recipes": {
            recipe: "" if recipe == UNTRAINED else identify(plan, recipe, minutes=plan.minutes)
            for recipe in plan.recipes
        },
        "minutes": plan.minutes,
        "tasks": list(plan.tasks),
    }
    looks: list[dict[str, Any]] = []
    if path.is_file():
        opened = read_json(path)
        looks = opened["looks"]
        if {key: opened[key] for key in asked} != asked:
            sys.exit(
                f"{path}: the test fold was opened on {looks[0]['at']} for {', '.join(opened['recipes'])}, "
                f"{opened['minutes']:g} minutes; it is opened once: choose on development folds (without --open-test), "
                "or measure what was opened then, with more seeds where you want them"
            )
        if looks[-1]["seeds"] == list(plan.seeds):
            return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(path, {**asked, "looks": [*looks, {"at": now, "seeds": list(plan.seeds)}]})


def prepare(data: Path, plan: Plan) -> tuple[Path, ...]:
    """Build the shards that are not built yet, and put the teacher's weights where recipes look for them."""
    if not (data / WEIGHTS).is_file():
        sys.exit(f"--data {data}: {WEIGHTS} is not there; name the folder of real images and weights")
    (plan.out / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    if not (plan.out / WEIGHTS).exists():
        (plan.out / WEIGHTS).symlink_to((data / WEIGHTS).resolve())
    folders = []
    for source, (card, folder) in SOURCES.items():
        if any(task.startswith(source) for task in plan.tasks):
            folders.append(plan.out / "shards" / source)
            if not (folders[-1] / "index.json").is_file():
                command = [sys.executable, "-m", "panfm", "shards", "build", card]
                command += ["--root", str((data / folder).resolve()), "--out", str(folders[-1])]
                log = plan.out / "shards.txt"
                wait(start(command, plan.out, log), command, log)
    return tuple(folders)


def shrink(plan: Plan) -> Plan:
    """A minute's worth: seconds of training, a ViT-Tiny at 64 px, photographs only. It says that the parts fit."""
    return replace(
        plan,
        minutes=0.05,
        seeds=(0,),
        tasks=TASKS[-1:],
        fractions=(1.0,),
        draws=1,
        turn_seconds=0.3,
        complete=False,
        overrides=(
            "encoder.name=vit_tiny_patch16_224",
            "encoder.image_size=64",
            "augment.image_size=64",
            "tracking.log_every=1",
        ),
        peer=("--encoder", "vit_tiny_patch16_224", "--image-size", "64", "--workers", "0"),
    )


def main() -> None:
    """Train, measure, print the tables, write the comparisons as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("PANFM_REAL_DATA")
    parser.add_argument("--data", type=Path, default=data, help="folder of real images; default $PANFM_REAL_DATA")
    parser.add_argument("--out", type=Path, required=True, help="folder of shards, runs, features and results")
    parser.add_argument("--minutes", type=float, default=20.0, help="budget of each training, at the speed measured")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each recipe")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--draws", type=int, default=5, help="choices of labels at 10 %%")
    parser.add_argument("--open-test", action="store_true", help="measure the test fold: once, recorded")
    parser.add_argument("--json", type=Path, help="write the comparisons here")
    parser.add_argument("--quick", action="store_true", help="end within a minute: tiny, and no claim")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped"))  # so that a training ends with it
    if arguments.data is None:
        parser.error("--data FOLDER is needed, or PANFM_REAL_DATA")
    if arguments.recipes == [UNTRAINED]:
        parser.error("--recipes: name one that is trained; the untrained encoder is built after it")
    plan = Plan(
        out=arguments.out.resolve(),
        minutes=arguments.minutes,
        seeds=tuple(range(arguments.seeds)),
        recipes=tuple(arguments.recipes or (QUICK_RECIPES if arguments.quick else RECIPES)),
        tasks=TASKS,
        fractions=(0.1, 1.0),
        draws=arguments.draws,
        turn_seconds=TURN_SECONDS,
    )
    if arguments.quick:
        plan = shrink(plan)
    plan = replace(plan, shards=prepare(arguments.data, plan))
    evaluate_on: EvaluatedOn = "test" if arguments.open_test else "development"
    train_all(plan)
    if arguments.open_test:
        open_test(plan)
    cells = compute_cells(plan, evaluate_all(plan, evaluate_on), evaluate_on)
    rows = compare(cells)
    print(f"\nfold: {evaluate_on}; {plan.minutes:g} minutes a training; {len(plan.seeds)} seeds")
    for line in show(plan, cells, rows):
        print(line)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
