"""Writes `pairs.csv` and `near_duplicates.csv`, which a report needs beside the predictions. They hold no text.

Computes the floors that need training: the scores of a criterion's prevalence and of a bag of words on the same folds.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raycv.common.files import write_bytes
from raycv.data.splits import Split
from raycv.data.types import Dataset
from raycv.results.near_duplicates import near_duplicates
from raycv.results.run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np

PRIOR, TFIDF = "prior", "tfidf"
"""The floors, by their columns in `pairs.csv`."""


def write_pair_records(
    folder: RunFolder, dataset: Dataset, splits: Sequence[Split], shortened: "np.ndarray | None"
) -> None:
    """Writes those of the two files that the run lacks. Only the user can read them.

    Args:
        folder: The run folder.
        dataset: The data set of the run.
        splits: The folds of the run.
        shortened: bool [P], as `EncodedPairs.shortened`; None leaves the column empty.

    Raises:
        UserError: The disk is full.
        OSError: A file cannot be written for another reason.
    """
    import pandas as pd

    if not folder.near_duplicates.is_file():
        found = near_duplicates(dataset.posts)
        _write(folder.near_duplicates, pd.DataFrame(found, columns=["post_id_a", "post_id_b", "jaccard"]))
    if not folder.pairs.is_file():
        prior, tfidf = floor_scores(dataset, splits)
        columns = {
            "post_id": [pair.post_id for pair in dataset.pairs],
            "criterion_id": [pair.criterion_id for pair in dataset.pairs],
            "fold": fold_of_pair(splits, len(dataset.pairs)),
            "label": [pair.label for pair in dataset.pairs],
            "shortened": None if shortened is None else shortened.astype(int),
            "hard_negative": hard_negatives(dataset),
            PRIOR: prior,
            TFIDF: tfidf,
        }
        _write(folder.pairs, pd.DataFrame(columns))


def fold_of_pair(splits: Sequence[Split], pairs: int) -> "np.ndarray":
    """Returns the fold that validates each pair, int64 [P]."""
    import numpy as np

    folds = np.full(pairs, -1)
    for split in splits:
        folds[split.val_indices] = split.fold
    return folds


def hard_negatives(dataset: Dataset) -> list[int] | None:
    """Returns 1 for each pair that an annotator looked at and found unmatched, else 0.

    Returns None if the files cannot tell: only those of the ReDSM5 release hold it.
    """
    if dataset.stats.get("layout") != "official":
        return None
    return [int(pair.explicit_negative) for pair in dataset.pairs]


def _write(path: Any, table: Any) -> None:
    write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode(), private=True)


REGULARISATION = 10.0
"""`C` of the logistic regression. A floor should be hard to beat. We chose the best of four settings on synthetic data
of the size of ReDSM5: 10 beat 1, and balanced classes beat unweighted ones."""


def floor_scores(dataset: Dataset, splits: Sequence[Split]) -> tuple["np.ndarray", "np.ndarray"]:
    """Scores each pair by two simple models that were trained without the pair's fold.

    The first is the share of matched pairs of the criterion in training. The second is TF-IDF of the post's words and
    pairs of words, and a logistic regression per criterion whose classes weigh the same. It scores the share where
    training has one class only, or no common word.

    Args:
        dataset: The pairs and the texts of their posts.
        splits: The folds, which together validate each pair once.

    Returns:
        The scores of both, float64 [P], in the order of `dataset.pairs`. Equal inputs give equal scores.
    """
    import numpy as np

    number = {post_id: index for index, post_id in enumerate(dataset.posts)}
    posts = np.array([number[pair.post_id] for pair in dataset.pairs])
    criteria = np.array([pair.criterion_id for pair in dataset.pairs])
    labels = np.array([pair.label for pair in dataset.pairs])
    texts = list(dataset.posts.values())
    prior, tfidf = np.full(len(labels), np.nan), np.full(len(labels), np.nan)
    for split in splits:
        words = _tfidf(texts, posts[split.train_indices])
        for criterion in dataset.criteria:
            train = split.train_indices[criteria[split.train_indices] == criterion]
            val = split.val_indices[criteria[split.val_indices] == criterion]
            # A criterion that is in no training pair has the share of all criteria.
            share = labels[train if len(train) else split.train_indices].mean()
            prior[val] = tfidf[val] = share
            if 0 < share < 1 and len(train) and len(val) and words is not None:
                tfidf[val] = _regression(words[posts[train]], labels[train], words[posts[val]])
    return prior, tfidf


def _tfidf(texts: Sequence[str], training_posts: "np.ndarray") -> "np.ndarray | None":
    """TF-IDF [posts, terms] of all `texts`, fitted on the training posts; None if these have no term in common."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        vectorizer.fit([texts[index] for index in np.unique(training_posts)])
    except ValueError:
        # scikit-learn raises it if no term is in two of the posts.
        return None
    return vectorizer.transform(texts)


def _regression(train: "np.ndarray", labels: "np.ndarray", val: "np.ndarray") -> "np.ndarray":
    from sklearn.linear_model import LogisticRegression

    # Other solvers use BLAS, whose sums depend on the number of threads.
    model = LogisticRegression(
        C=REGULARISATION, class_weight="balanced", solver="liblinear", max_iter=1000, random_state=0
    )
    return model.fit(train, labels).predict_proba(val)[:, 1]
