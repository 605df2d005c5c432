"""raycv: cross-validated fine-tuning of LLM classifiers for (post, DSM-5 criterion) pairs."""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycv.api import Comparison, Run, compare_runs, cross_validate, load_run

__version__ = "0.1.0"
__all__ = ["Comparison", "Run", "__version__", "compare_runs", "cross_validate", "load_run"]

_lacking = [name for name in ("hydra", "pydantic", "torch") if find_spec(name) is None]
if _lacking:
    _what = (
        f"raycv: {sys.executable} lacks the packages that raycv needs ({', '.join(_lacking)}). "
        "Where .venv has them: source .venv/bin/activate; else: make install, then that"
    )
    # `python -m raycv.run` imports this first: a user mistook the Python, and a traceback would say less.
    if sys.argv[:1] == ["-m"]:
        sys.stderr.write(f"{_what}.\n")
        raise SystemExit(2)
    raise ModuleNotFoundError(_what)


def __getattr__(name: str) -> Any:
    """Imports the Python API when it is first used, since every command imports this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from raycv import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
