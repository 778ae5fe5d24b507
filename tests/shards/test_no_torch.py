"""The first room runs without torch: a hospital's archive machine needs no GPU stack."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import panfm.shards
names = [module.name for module in pkgutil.iter_modules(panfm.shards.__path__, "panfm.shards.")]
for name in [*names, "panfm.config", "panfm.executor", "panfm.files"]:
    importlib.import_module(name)
heavy = {"torch", "torchvision", "timm", "lightly", "deepspeed", "webdataset", "sklearn"} & set(sys.modules)
print(len(names), sorted(heavy))
"""


def test_no_module_of_the_room_loads_torch() -> None:
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    count, heavy = answer.split(maxsplit=1)
    assert int(count) >= 10 and heavy.strip() == "[]"
