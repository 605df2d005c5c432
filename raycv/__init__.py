"""raycv: cross-validated fine-tuning of LLM classifiers for (post, DSM-5 criterion) pairs."""

__version__ = "0.1.0"
