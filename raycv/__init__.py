"""raycv: cross-validated fine-tuning of LLM classifiers for (post, DSM-5 criterion) pairs."""

import sys
from importlib.util import find_spec

__version__ = "0.1.0"

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
