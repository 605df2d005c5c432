"""`python -m raycv.run` whose workers write down when each phase of a fold began, for `benchmarks.overhead`."""

import json
import time
from pathlib import Path
from typing import Any

MARKS = "marks_{fold}.json"


def timed_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """The worker of a fold, its imports done first; leaves `MARKS` in the run's folder, times of the clock."""
    marks = {"worker": time.time()}
    from raycv.common.environment import seldom_collecting

    with seldom_collecting():
        import raycv.model.adapters
        import raycv.model.loading
        import raycv.training.loop
        import raycv.training.state
        from raycv.orchestration import fold_worker

    marks["imported"] = time.time()
    fit, save = raycv.training.loop.FoldTrainer.fit, fold_worker.save_fold_checkpoint

    def timed_fit(*given: Any) -> Any:
        marks["built"] = time.time()
        result = fit(*given)
        marks["trained"] = time.time()
        return result

    def timed_save(*given: Any) -> None:
        marks["saving"] = time.time()
        save(*given)
        marks["saved"] = time.time()

    raycv.training.loop.FoldTrainer.fit = timed_fit  # type: ignore[method-assign, assignment]
    fold_worker.save_fold_checkpoint = timed_save  # type: ignore[assignment]
    returned = fold_worker.train_worker(arguments)
    marks["ended"] = time.time()
    path = Path(arguments["task"].root) / MARKS.format(fold=arguments["fold"])
    path.write_text(json.dumps(marks), encoding="utf-8")
    return returned


def main() -> None:
    from raycv import run
    from raycv.orchestration import ray_tune

    ray_tune.train_worker = timed_worker
    run.main()


if __name__ == "__main__":
    main()
