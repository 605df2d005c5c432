"""What raycv costs, beside what it replaces: a command each, JSON in `results/`, the table in the README."""
