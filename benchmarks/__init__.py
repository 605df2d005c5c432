"""What raycv costs, measured beside what it replaces: a command each, results in `results/`, the table in the README."""
