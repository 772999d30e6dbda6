"""What tests and the kernels of `pytest --nbval` inherit, and the options of nbval that need an absolute path."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.resolve()

# nbval starts a kernel in the notebook's folder with this process's environment.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["OMP_NUM_THREADS"] = "1"  # one order of sums; and two kernels would fight over the cores
os.environ["PYTHONHASHSEED"] = "0"
os.environ.pop("MPLBACKEND", None)  # a backend set for the whole machine hides every picture
os.environ.pop("SLM_LADDER", None)  # a test adds no rows to anybody's ladder


def pytest_configure(config):
    option = config.option
    if getattr(option, "nbval", False) or getattr(option, "nbval_lax", False):
        option.nbval_current_env = option.nbval_kernel_name is None  # not whatever kernel the author's machine had
        option.nbval_cell_timeout = min(option.nbval_cell_timeout, 300)  # by default half an hour
        option.nbval_sanitize_with = option.nbval_sanitize_with or str(ROOT / "tests" / "nbval_sanitize.cfg")
