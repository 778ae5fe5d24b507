"""Python runs this at its start where its folder is on PYTHONPATH: hooks.py into ranks that torchrun starts."""

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class _WrapOptim(MetaPathFinder):
    """Wraps panfm.optim.compute_lr when panfm.optim is imported, so that whoever imports it gets the wrapped one."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "panfm.optim":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            hooks = importlib.util.spec_from_file_location("hooks", Path(__file__).parents[1] / "hooks.py")
            assert hooks is not None and hooks.loader is not None
            wrapper = importlib.util.module_from_spec(hooks)
            hooks.loader.exec_module(wrapper)
            module.compute_lr = wrapper.wrap(module.compute_lr)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if any(name.startswith("PANFM_TEST_") for name in os.environ):
    sys.meta_path.insert(0, _WrapOptim())
