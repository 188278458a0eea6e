"""How many evaluations each class of samples gets, chosen before sampling from errors on noise set apart.

With e[c, j] the mean error of class c under option j, which costs nfe[j] evaluations, and n_c samples of class c,

    minimise Σ_c n_c e[c, j_c]    subject to    Σ_c n_c nfe[j_c] ≤ budget · Σ_c n_c,

one option a class: a multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, §11), solved exactly by dynamic
programming over the whole numbers of evaluations that can be spent.

Whether a number that is known before sampling (the complexity of a class) predicts the steps that its samples need is
asked with a rank correlation and its interval; `steps_needed` says what they need.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from ado_tasks.errors import ConfigError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MAX_STATES = 20_000_000  # classes times spendable evaluations: 160 MB of choices and values; digits need 60,000


@dataclass(frozen=True)
class StepPolicy:
    """For each class the index of its option, with what that costs and gives over all samples."""

    options: Integers  # (C,)
    nfe: Integers  # (C,): evaluations of a sample of each class
    mean_nfe: float
    mean_error: float


def best_policy(errors: npt.ArrayLike, nfe: npt.ArrayLike, counts: npt.ArrayLike, budget: float) -> StepPolicy:
    """The option of each class with the least mean error at a mean number of evaluations of at most `budget`.

    Args:
        errors: (C, J) mean error of a sample of class c under option j.
        nfe: (J,) whole evaluations an option costs, ≥ 1; need not be sorted, may repeat.
        counts: (C,) samples of each class, ≥ 1.
        budget: mean evaluations a sample; fractions of an evaluation in total are lost.

    Raises:
        ConfigError: not even the cheapest option fits, shapes do not agree, or there is too much to choose from.
    """
    table, costs, weights = _checked(errors, nfe, counts)
    unit = int(np.gcd.reduce(np.outer(weights, costs).ravel()))
    spend = np.outer(weights, costs) // unit  # (C, J)
    total = int(np.floor(budget * weights.sum() / unit * (1 + 1e-12)))
    if spend.min(axis=1).sum() > total:
        cheapest = float(unit * spend.min(axis=1).sum() / weights.sum())
        raise ConfigError(f"budget: {budget} evaluations is not allowed: the cheapest options cost {cheapest:g}")
    if len(weights) * (total + 1) > MAX_STATES:
        raise ConfigError(f"counts: {weights.sum()} samples are too many to choose exactly for; divide the counts")
    value, chosen = np.zeros(total + 1), []  # value[b]: least error of the classes so far that spend at most b
    for gains, prices in zip(weights[:, None] * table, spend, strict=True):
        through = np.full((len(prices), total + 1), np.inf)
        for option, (gain, price) in enumerate(zip(gains, prices, strict=True)):
            if price <= total:
                through[option, price:] = value[: total + 1 - price] + gain
        chosen.append(through.argmin(axis=0))
        value = through.min(axis=0)
    options, left = np.empty(len(weights), np.int64), total
    for place in reversed(range(len(weights))):
        options[place] = chosen[place][left]
        left -= int(spend[place, options[place]])
    return _policy(options, table, costs, weights)


def fixed_policy(errors: npt.ArrayLike, nfe: npt.ArrayLike, counts: npt.ArrayLike, budget: float) -> StepPolicy:
    """The one option for all classes with the least mean error that costs at most `budget`. Raises as `best_policy`."""
    table, costs, weights = _checked(errors, nfe, counts)
    if costs.min() > budget:
        raise ConfigError(f"budget: {budget} evaluations is not allowed: the cheapest option costs {costs.min()}")
    means = np.where(costs <= budget, weights @ table, np.inf)
    return _policy(np.full(len(weights), int(means.argmin())), table, costs, weights)


def steps_needed(errors: npt.ArrayLike, nfe: npt.ArrayLike, level: float) -> Floats:
    """Evaluations at which the error first falls to `level`, (n,) for errors (n, J) > 0 at nfe (J,) rising.

    Between two numbers of evaluations log error is a straight line in log nfe. Where the error is under the level from
    the first: nfe[0]; where it never gets there: nfe[-1]. Both are censored: ranks of them are ties.
    """
    table, costs = np.asarray(errors, np.float64), np.asarray(nfe, np.float64)
    if table.ndim != 2 or table.shape[1:] != costs.shape or (np.diff(costs) <= 0).any():
        raise ConfigError(f"errors, nfe: {table.shape} and {costs.shape}; one error for each of rising numbers")
    logs, target = np.log(np.maximum(table, np.finfo(float).tiny)), np.log(level)
    under = logs <= target
    first = np.where(under.any(axis=1), under.argmax(axis=1), len(costs) - 1)
    rows, before = np.arange(len(table)), np.maximum(first - 1, 0)
    fall = logs[rows, before] - logs[rows, first]
    share = np.where(fall > 0, (logs[rows, before] - target) / np.where(fall > 0, fall, 1.0), 1.0)
    found = np.exp(np.log(costs[before]) + np.clip(share, 0, 1) * (np.log(costs[first]) - np.log(costs[before])))
    return np.where(first == 0, costs[0], np.where(under.any(axis=1), found, costs[-1]))


def class_complexity(index: pd.DataFrame, classes: int) -> Floats:
    """Mean complexity of the images of each class, (C,), from rows of `index.parquet`: known before sampling."""
    values = index["complexity"].to_numpy(np.float64)
    return class_errors(values[:, None], index["label"].to_numpy(np.int64), classes)[:, 0]


def class_errors(errors: npt.ArrayLike, labels: npt.ArrayLike, classes: int) -> Floats:
    """Mean over the samples of each class: errors (n, J), labels (n,) to (C, J). Every class needs a sample."""
    table, codes = np.asarray(errors, np.float64), np.asarray(labels)
    counts = np.bincount(codes, minlength=classes)
    if (counts == 0).any():
        raise ConfigError(f"labels: no sample of class {int(counts.argmin())}; one of each is needed")
    return np.stack([np.bincount(codes, column, minlength=classes) / counts for column in table.T], axis=1)


def _checked(errors: npt.ArrayLike, nfe: npt.ArrayLike, counts: npt.ArrayLike) -> tuple[Floats, Integers, Integers]:
    table, costs, weights = np.asarray(errors, np.float64), np.asarray(nfe), np.asarray(counts)
    if table.ndim != 2 or table.shape != (len(weights), len(costs)) or not table.size:
        shapes = f"{table.shape}, {costs.shape}, {weights.shape}"
        raise ConfigError(f"errors, nfe, counts: shapes {shapes}; (C, J), (J,) and (C,) are required")
    if not np.isfinite(table).all():
        raise ConfigError("errors: not all are finite")
    for name, values in (("nfe", costs), ("counts", weights)):
        if (values < 1).any() or (values != np.floor(values)).any():
            raise ConfigError(f"{name}: {values.tolist()} are not allowed: whole numbers of at least 1")
    return table, costs.astype(np.int64), weights.astype(np.int64)


def _policy(options: Integers, table: Floats, costs: Integers, weights: Integers) -> StepPolicy:
    spent, error = costs[options], table[np.arange(len(weights)), options]
    total = weights.sum()
    return StepPolicy(options, spent, float(weights @ spent / total), float(weights @ error / total))
