"""Tools for the people who develop raycv: checks of the docs, generated pages, licenses, the tiny base."""
