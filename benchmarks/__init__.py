"""What raycv costs, beside what it replaces: a command each, JSON in `results/`, the tables in the docs."""

import raycv  # noqa: F401 - first, since it says so where what all of this needs is not installed
