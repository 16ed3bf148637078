"""Logistic regression and gradient boosting on statistics, cross-fitted over users.

Every statistic of a user or an item comes from records that are no candidate. What is fitted on labels is applied only
to users whose labels it has not seen. A statistic that contains the label of the row it describes, or of another row
of the same user (a leave-one-out mean, for example), lets boosting read the label; folds of users rule that out.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gubs.evaluate.feedback import Bools, Floats, Ints

FOLDS = 5
TREES = 150
"""Of a boosted model."""
_SMALL = 1_000_000
"""Features of all rows together. With fewer, threads that wait for each other take more time than one that works: on
two busy cores 18 s of CPU instead of 0.4 for 1,000 rows."""
Labels = npt.NDArray[np.generic]
"""The class of each row, [n]."""


class Classifier(Protocol):
    """What is used of a fitted scikit-learn classifier."""

    @property
    def classes_(self) -> Labels:
        """The classes, [K]."""

    def predict_proba(self, X: Floats, /) -> npt.ArrayLike:  # noqa: N803  # scikit-learn's name
        """Probability of each class, [n, K]."""


Fit = Callable[[Floats, Labels], Classifier]
"""(features [n, F], labels [n]) -> a fitted classifier."""


def logistic(features: Floats, labels: Labels) -> Classifier:
    """Logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(features, labels)


def boosting(features: Floats, labels: Labels) -> Classifier:
    """Gradient-boosted trees; NaN is a value of its own."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    model = HistGradientBoostingClassifier(
        max_iter=TREES,
        learning_rate=0.06,
        max_leaf_nodes=15,
        min_samples_leaf=40,
        l2_regularization=1.0,
        random_state=0,
    )
    with threadpool_limits(1 if features.size < _SMALL else None, "openmp"):
        return model.fit(features, labels)


LEARNERS: Mapping[str, Fit] = {"logistic": logistic, "boosting": boosting}


def folds_of_users(user: Ints, seed: int, folds: int = FOLDS) -> Ints:
    """The fold of each row, [n]; all rows of a user are in one fold, and folds have about equally many users."""
    users, codes = np.unique(user, return_inverse=True)
    fold = np.random.default_rng([seed, 17]).permutation(len(users)) % folds
    return fold[codes]


def cross_fitted(features: Floats, labels: Bools, fold: Ints, fit: Fit) -> Floats:
    """Probability of each row by a model fitted on the other folds, [n]; the base rate where those have one class."""
    probability = np.full(len(labels), float(labels.mean()) if len(labels) else 0.0)
    for f in np.unique(fold):
        rest = fold != f
        if len(np.unique(labels[rest])) == 2:
            probability[~rest] = probabilities(fit(features[rest], labels[rest]), features[~rest])
    return probability


def probabilities(model: Classifier, features: Floats) -> Floats:
    """Probability of True, [n]."""
    return class_probabilities(model, features)[:, 1]


def class_probabilities(model: Classifier, features: Floats) -> Floats:
    """Probabilities of the classes in `model.classes_`, [n, K]."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1 if features.size < _SMALL else None, "openmp"):
        return np.asarray(model.predict_proba(features))


def rate(positives: npt.ArrayLike, totals: npt.ArrayLike, prior: float, strength: float = 5.0) -> Floats:
    """A rate, drawn to `prior` as if `strength` more records had it; where there are none, it is the prior."""
    return np.asarray((np.asarray(positives) + strength * prior) / (np.asarray(totals) + strength))


def best_threshold(score: Floats, labels: Bools, *, balanced: bool = False) -> float:
    """The threshold t for which "yes from t on" has the best accuracy (or balanced accuracy).

    Args:
        score: [n].
        labels: [n].
        balanced: weigh both classes alike.
    """
    order = np.argsort(-score, kind="stable")
    ranked, yes = score[order], labels[order]
    weight_yes, weight_no = (1 / max(1, yes.sum()), 1 / max(1, (~yes).sum())) if balanced else (1.0, 1.0)
    gained = np.concatenate([[0.0], np.cumsum(np.where(yes, weight_yes, -weight_no))])  # against saying no to all
    border = np.concatenate([[True], ranked[1:] < ranked[:-1], [True]])  # a threshold cannot part equal scores
    best = int(np.argmax(np.where(border, gained, -np.inf)))
    return float(np.inf if best == 0 else ranked[best - 1])


def cross_thresholds(score: Floats, labels: Bools, fold: Ints) -> Bools:
    """Yes or no by the threshold that is best in the other folds, [n]."""
    yes = np.zeros(len(score), dtype=bool)
    for f in np.unique(fold):
        yes[fold == f] = score[fold == f] >= best_threshold(score[fold != f], labels[fold != f])
    return yes
