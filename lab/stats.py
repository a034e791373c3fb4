"""The laboratory's statistics, in one place: every interval of every table is made here.

    fit_contrast      one arm less another in the model value = arm + block, where a block is a seed of a setting.
                      Student's t from the residuals of all arms: many more degrees of freedom than pairs of seeds
    permuted_slope    the slope of a value on a property of the arms, by permutation of the arms
    Clusters          a bootstrap over problems (clusters): all responses to a problem stay together
    jackknife         any statistic of independent pieces, from its values with one piece left out (means_without)
    mean_of_pairs     the square of a mean's norm without bias, from inner products (a U-statistic)
    power             how likely a difference is seen, and smallest_seen: the smallest that is seen in 80 of 100 cases

All intervals are 95 %. tests/lab/test_stats.py plants known values and counts how often the intervals hold them.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats


class Estimate(NamedTuple):
    """A value, its 95 % interval, and the p-value of "it is 0", where there is one."""

    value: float
    low: float
    high: float
    p: float = float("nan")

    def text(self, form: str = "+.1f") -> str:
        """
        >>> Estimate(1.25, -0.5, 3.0).text()
        '+1.2 (-0.5 to +3.0)'
        """
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"

    def percent(self, form: str = ".0f") -> str:
        """
        >>> Estimate(0.5, 0.4, 0.625).percent()
        '50 % (40 to 62)'
        """
        value, low, high = (100 * x for x in self[:3])
        return f"{value:{form}} % ({low:{form}} to {high:{form}})"


def from_error(value: float, error: float, df: float) -> Estimate:
    """Student's t: the interval and p of an estimate with this standard error and these degrees of freedom."""
    half = stats.t.ppf(0.975, df) * error
    p = 2 * stats.t.sf(abs(value) / error, df) if error > 0 else float("nan")
    return Estimate(float(value), float(value - half), float(value + half), float(p))


# ---- Runs: arms and blocks ----


class Value(NamedTuple):
    """A measured value of one run."""

    arm: str
    block: Hashable  # what the runs of a comparison share: (setting, seed)
    value: float


class Fit(NamedTuple):
    """The linear model value = arm + block."""

    arms: list[str]
    weights: np.ndarray  # [arms, runs]: what each run's value counts in an arm's effect
    effects: np.ndarray  # [arms], known up to a common constant
    sd: float  # of the residuals
    df: int


def fit(values: Sequence[Value]) -> Fit:
    """Least squares. An arm may have several runs in a block, and blocks may lack arms."""
    arms, blocks = (sorted({v[i] for v in values}, key=str) for i in (0, 1))
    design = np.zeros((len(values), len(arms) + len(blocks)))
    for row, v in zip(design, values):
        row[arms.index(v.arm)] = row[len(arms) + blocks.index(v.block)] = 1
    y = np.array([v.value for v in values])
    inverse = np.linalg.pinv(design)  # [columns, runs]
    df = len(values) - np.linalg.matrix_rank(design)
    residuals = y - design @ (inverse @ y)
    weights = inverse[: len(arms)]
    return Fit(arms, weights, weights @ y, float((residuals @ residuals / df) ** 0.5), int(df))


def contrast_parts(values: Sequence[Value], one: str, other: str) -> tuple[float, float, int]:
    """Arm `one` less arm `other`: the difference, its standard error and the degrees of freedom.

    Arms that are not compared help to know the blocks and the noise.
    """
    model = fit(values)
    i, j = model.arms.index(one), model.arms.index(other)
    error = model.sd * np.linalg.norm(model.weights[i] - model.weights[j])
    return float(model.effects[i] - model.effects[j]), float(error), model.df


def fit_contrast(values: Sequence[Value], one: str, other: str) -> Estimate:
    """Arm `one` less arm `other`, with Student's t from the residuals of all arms."""
    return from_error(*contrast_parts(values, one, other))


def permuted_slope(values: Sequence[Value], x: dict[str, float], draws: int = 4000, seed: int = 0) -> Estimate:
    """The slope of the values on x, a property of the arms, with an effect of each block taken out.

    p comes from giving the x of one arm to another: in every order where these are at most `draws`, else in so many at
    random. The interval holds the slopes that the same test does not reject (p > 0.05), of the values less that line.
    """
    arms = sorted(x)
    kept = [v for v in values if v.arm in x]
    arm_of = np.array([arms.index(v.arm) for v in kept])
    blocks = sorted({v.block for v in kept}, key=str)
    block_of = np.array([blocks.index(v.block) for v in kept])
    one_hot = np.eye(len(blocks))[block_of]  # [runs, blocks]
    means = one_hot / one_hot.sum(0)

    def centred(z: np.ndarray) -> np.ndarray:  # [..., runs], each block's mean taken out
        return z - (z @ means) @ one_hot.T

    def slope(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (centred(z) * y).sum(-1) / (centred(z) ** 2).sum(-1)

    y, by_arm = centred(np.array([v.value for v in kept])), np.array([x[arm] for arm in arms])
    fitted = slope(by_arm[arm_of], y)
    if math.factorial(len(arms)) <= draws:
        orders = np.array(list(itertools.permutations(by_arm)))
    else:
        rng = np.random.default_rng(seed)
        orders = np.stack([by_arm, *(rng.permutation(by_arm) for _ in range(draws))])
    shuffled = orders[:, arm_of]  # [orders, runs]; one of them is the arms as they are
    of_values, of_x = slope(shuffled, y), slope(shuffled, centred(by_arm[arm_of]))
    p = (abs(of_values) >= abs(fitted) - 1e-12).mean()

    def margin(b: float) -> float:  # above 0: a line of slope b is rejected
        return abs(fitted - b) - np.quantile(abs(of_values - b * of_x), 0.95)

    far = 10 * np.quantile(abs(of_values - fitted * of_x), 0.95)
    low, high = (optimize.brentq(margin, fitted, fitted + side * far, xtol=1e-4 * far) for side in (-1, 1))
    return Estimate(float(fitted), float(low), float(high), float(p))


def power(difference: float, error: float, df: float) -> float:
    """The chance that Student's t sees a positive difference (p < 0.05), from its standard error.

    Of five pairs that differ with an sd of 2 or 3.2 points:

    >>> round(power(3.0, 2.0 / 5**0.5, 4), 2), round(power(3.0, 3.2 / 5**0.5, 4), 2)
    (0.71, 0.36)
    """
    return float(stats.nct.sf(stats.t.ppf(0.975, df), df, difference / error))


def smallest_seen(error: float, df: float, chance: float = 0.8) -> float:
    """The difference that is seen with this chance.

    >>> round(smallest_seen(3.2 / 5**0.5, 4), 1)
    5.4
    """
    return float(optimize.brentq(lambda d: power(d, error, df) - chance, 1e-6 * error, 12 * error))


# ---- Tokens: responses in clusters ----


class Clusters:
    """A bootstrap over problems: every draw takes as many problems with replacement, each with all its responses.

    The percentiles are those of Hesterberg's expanded percentile interval: plain ones are too narrow for few problems,
    by 15 % for 12.
    """

    def __init__(self, problem: Sequence[int], draws: int = 1000):
        self.problem = np.asarray(problem)  # [B], each response's problem, numbered from 0
        self.count = int(self.problem.max()) + 1
        sizes = np.random.default_rng(0).multinomial(self.count, np.full(self.count, 1 / self.count), draws)
        self.draws = np.vstack([np.ones(self.count), sizes])  # [1 + draws, problems]; the first is the sample itself

    def sums(self, x) -> np.ndarray:
        """Sums of x, one number or array a response, in each draw. [1 + draws, ...]"""
        x = np.asarray(x, dtype=float)
        by_problem = np.zeros((self.count, *x.shape[1:]))
        np.add.at(by_problem, self.problem, x)
        return np.tensordot(self.draws, by_problem, 1)

    def ratio(self, one, other) -> Estimate:
        """A sum over responses over another."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.interval(self.sums(one) / self.sums(other))

    def mean(self, x) -> Estimate:
        return self.ratio(x, np.ones(len(self.problem)))

    def interval(self, draws: np.ndarray) -> Estimate:
        """From a statistic in every draw, the first of which is the sample itself. [1 + draws]"""
        z = stats.t.ppf(0.975, self.count - 1) * (self.count / (self.count - 1)) ** 0.5
        low, high = np.nanquantile(draws[1:], stats.norm.cdf([-z, z]))
        return Estimate(float(draws[0]), float(low), float(high))


# ---- Gradients: pieces left out one at a time ----


def means_without(x: np.ndarray) -> np.ndarray:
    """Means of x [M,P] without row i and column j; the last row and the last column leave nothing out. [M+1,P+1]

    >>> means_without(np.array([[1.0, 2.0], [3.0, 5.0]]))
    array([[5.  , 3.  , 4.  ],
           [2.  , 1.  , 1.5 ],
           [3.5 , 2.  , 2.75]])
    """
    left = [np.maximum(size - (np.arange(size + 1) < size), 1) for size in x.shape]  # rows, and columns, that are left
    x = np.pad(x, ((0, 1), (0, 1)))
    return (x.sum() - x.sum(1, keepdims=True) - x.sum(0, keepdims=True) + x) / (left[0][:, None] * left[1])


def jackknife(table: np.ndarray) -> Estimate:
    """A statistic of independent pieces, from its values with one piece left out.

    table [M+1]: without piece i; the last is the statistic of all. Or [M+1,P+1], for pieces of two kinds (minibatches,
    and parts of the sample that they are held against): without row i and column j. Then the variances of both kinds
    add up, less that of their interaction, which both contain.
    """
    if table.ndim == 1:
        table = table[:, None]
    (m, n), whole = (size - 1 for size in table.shape), table[-1, -1]
    rows, columns = table[:-1, -1], table[-1, :-1]
    parts = [(x, len(x) - 1) for x in (rows, columns) if len(x)]
    variances = [free * x.var() for x, free in parts]
    interaction = table[:-1, :-1] - rows[:, None] - columns + whole
    total = sum(variances) - ((m - 1) * (n - 1) / (m * n) * (interaction**2).sum() if n else 0.0)
    total = max(total, *variances) if n else total  # the interaction is known badly: never below one kind alone
    df = sum(variances) ** 2 / max(sum(v**2 / free for v, (_, free) in zip(variances, parts)), 1e-300)
    return from_error(whole, total**0.5, max(df, 1.0))


def mean_of_pairs(diagonal: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """<E a, E b> without bias, without each piece in turn, and last of all pieces. [M+1]

    This is the mean inner product <a_i, b_j> over the pairs i != j of M pieces (a U-statistic).

    diagonal [M]: <a_i, b_i>. sums [M]: row i and column i of the whole matrix of inner products, added up.
    The mean over all i and j would be too large by what the pieces vary by, over M.

    >>> a = np.array([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
    >>> gram = a @ a.T
    >>> mean_of_pairs(gram.diagonal(), gram.sum(0) + gram.sum(1))  # the last: (3 + 3 + 3) / 3
    array([3., 3., 3., 3.])
    """
    diagonal, sums = np.append(diagonal, 0.0), np.append(sums, 0.0)  # the last "piece" is nothing
    count = len(diagonal) - 1 - (np.arange(len(diagonal)) < len(diagonal) - 1)
    return ((sums.sum() / 2 - sums + diagonal) - (diagonal.sum() - diagonal)) / (count * (count - 1))
