"""`python -m raycv.synthesize out=... posts=...`: a synthetic data set of any size."""

import os
from pathlib import Path

from raycv.config.command_line import run_command
from raycv.config.schema import SynthesizeConfig
from raycv.data.synthetic import DATASET_FILES, write_dataset


def run(config: SynthesizeConfig) -> None:
    """Writes the data set that `config` describes, and prints what it holds."""
    from rich.console import Console

    from raycv.rendering.terminal import say

    replaced = os.path.isfile(Path(config.out) / "posts.csv")
    stats = write_dataset(
        Path(config.out),
        posts=config.posts,
        seed=config.seed,
        profile=config.profile,
        words_mean=config.words_mean,
        criteria=config.criteria,
    )
    console = Console()
    in_place = ", in the place of an earlier synthetic set" if replaced else ""
    say(console, f"Wrote {Path(config.out).absolute()}{in_place}: {', '.join(DATASET_FILES)}")
    for key, value in stats.items():
        say(console, f"  {key}: {round(value, 4) if isinstance(value, float) else value}")
    data = f"data.dir={config.out} data.criteria_dir={config.out}"
    say(console, f"Train on it: python -m raycv.run {data}")
    say(console, f"or without a GPU: python -m raycv.run experiment=quickstart {data}")


def main() -> None:
    run_command("synthesize", SynthesizeConfig, run)


if __name__ == "__main__":
    main()
