"""PTLoss on a mixture whose truth is known: is the proxy, and its student, nearer to it?

Three Gaussians with covariances of their own give p*(class | x) in closed form. A teacher is p*
itself or p* spoiled in one of four ways. From it and 200 labels, each way makes a target; a student
(softmax of a quadratic in x) learns the target on 3,000 points without labels. Distances are to p*
on 4,000 further points. All ways of a seed have the same points, labels and teacher.

    python scripts/bench_ptloss.py [SEEDS [PROCESSES]]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from effbench.nn.losses.fitting import Fit, fit, zeros
from effbench.nn.losses.labelled import labelled
from effbench.nn.losses.perturbed import Groups, groups_of
from effbench.nn.losses.proxy import proxy
from effbench.nn.losses.recalibration import Recalibration
from effbench.nn.losses.teaching import Teaching
from effbench.report.table import Cell, Table

CLASSES, LABELS, UNLABELLED, TEST, ORDERS, DRAWS = 3, 200, 3000, 4000, 5, 400
Teacher = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From points [N, 2] and log p* [N, C] to logits [N, C]."""


class Mixture(NamedTuple):
    """Gaussians of equal weight."""

    means: torch.Tensor
    """[C, 2]."""
    roots: torch.Tensor
    """Cholesky factors of the covariances, [C, 2, 2]."""

    def points(self, count: int, draws: torch.Generator) -> torch.Tensor:
        """Return points [N, 2]."""
        of = torch.randint(CLASSES, (count,), generator=draws)
        noise = torch.randn(count, 2, 1, generator=draws, dtype=torch.float64)
        return self.means[of] + (self.roots[of] @ noise)[..., 0]

    def truth(self, x: torch.Tensor) -> torch.Tensor:
        """Return log p* of points, [N, C]."""
        normal = torch.distributions.MultivariateNormal(self.means, scale_tril=self.roots)
        return normal.log_prob(x[:, None]).log_softmax(-1)


def mixture(draws: torch.Generator) -> Mixture:
    """Return means about 1.5 apart and covariances about 1."""
    means = 1.2 * torch.randn(CLASSES, 2, generator=draws, dtype=torch.float64)
    tilt = 0.3 * torch.randn(CLASSES, 2, 2, generator=draws, dtype=torch.float64)
    return Mixture(means, torch.eye(2, dtype=torch.float64) + tilt.tril())


def teachers(draws: torch.Generator) -> dict[str, Teacher]:
    """Return the truth and ways to spoil it; the last is none that scaling can undo."""
    wave = torch.randn(2, CLASSES, generator=draws, dtype=torch.float64)
    bias = (1.0, 0.0, -0.5)
    return {
        "calibrated": lambda x, p: p,
        "sharpened": lambda x, p: Recalibration(1.8)(p),
        "biased": lambda x, p: Recalibration(1.0, bias)(p),
        "both": lambda x, p: Recalibration(1.8, bias)(p),
        "both, and wrong in places": lambda x, p: Recalibration(1.8, bias)(p) + torch.sin(x @ wave),
    }


class Way(NamedTuple):
    """What is made of a teacher and labels, and what a student then minimises."""

    what: str
    by: Groups = "all"
    teaching: Teaching = Teaching()
    uses_teacher: bool = True
    to_proxy: bool = False


WAYS = {
    "KL": Way("none"),
    "KL, temperature": Way("temperature"),
    "KL, vector scaling": Way("vector"),
    "PTLoss, one eps": Way("eps"),
    "PTLoss, eps by class": Way("eps", "class"),
    "KL to its explicit proxy": Way("eps", "class", to_proxy=True),
    "label smoothing 0.1": Way("none", teaching=Teaching(smoothing=0.1)),
    "focal, gamma 2": Way("none", teaching=Teaching(divergence="focal")),
    "reverse KL": Way("none", teaching=Teaching(divergence="reverse_kl")),
    "KL and labels": Way("none", teaching=Teaching(beta=1.0)),
    "labels alone": Way("none", teaching=Teaching(beta=1.0), uses_teacher=False),
}


def features(x: torch.Tensor) -> torch.Tensor:
    """Return 1, x, y, x^2, x y, y^2 of points."""
    return torch.stack([x[:, 0] ** i * x[:, 1] ** j for i in range(3) for j in range(3 - i)], -1)


def trained(loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return a student's weights [features, C] that minimise a loss of its logits."""
    weights = torch.zeros(features(x).shape[1], CLASSES, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        lbfgs.zero_grad()
        value = loss(features(x) @ weights) + 1e-5 * weights.square().sum()
        value.backward()
        return value

    lbfgs.step(step)
    return weights.detach()


class Seed:
    """Points, labels and fits of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draws = torch.Generator().manual_seed(seed)
        self.mixture = mixture(draws)
        self.teachers = teachers(draws)
        self.known, self.train, self.test = (
            self.mixture.points(n, draws) for n in (LABELS, UNLABELLED, TEST)
        )
        true = self.mixture.truth(self.known).exp()
        self.labels = true.multinomial(1, generator=draws)[:, 0]
        self.truth = self.mixture.truth(self.test)
        self.fits: dict[tuple[str, str, str], Fit] = {}

    def logits(self, teacher: str, x: torch.Tensor) -> torch.Tensor:
        """Return a teacher's logits."""
        return self.teachers[teacher](x, self.mixture.truth(x))

    def fit(self, teacher: str, way: Way) -> Fit:
        """Return what is fitted to the labels, once for all that need it."""
        key = teacher, way.what, way.by
        if key not in self.fits:
            start = Fit(zeros(CLASSES if way.by == "class" else 1, ORDERS))
            log_t = self.logits(teacher, self.known).log_softmax(-1)
            data = labelled(log_t, self.labels, torch.arange(LABELS), entries=CLASSES)
            self.fits[key] = (
                start
                if way.what == "none"
                else fit(data, way.what, way.by, start, DRAWS, self.seed, LABELS)  # type: ignore[arg-type]
            )
        return self.fits[key]

    def student(self, teacher: str, way: Way) -> torch.Tensor:
        """Return the log-probabilities of a student on the test points, [N, C].

        The labelled points come first, and have a label where the way has a use for it.
        """
        found = self.fit(teacher, way)
        teaching = Teaching(**{**vars(way.teaching), "groups": way.by})
        x = torch.cat([self.known, self.train]) if way.uses_teacher else self.known
        labels = torch.full((len(x),), -1)
        labels[:LABELS] = self.labels
        aim = self.logits(teacher, x)
        if way.to_proxy:
            p_t, eps = aim.softmax(-1), found.coefficients(aim.device)
            aim, found = proxy(p_t, eps, groups_of(aim, way.by)).log(), Fit(zeros(CLASSES, 0))

        def loss(logits: torch.Tensor) -> torch.Tensor:
            if not way.uses_teacher:
                return torch.nn.functional.cross_entropy(logits, labels)
            return teaching.losses(aim, logits, labels, found).mean()

        return (features(self.test) @ trained(loss, x)).log_softmax(-1)

    def measured(self, teacher: str, way: Way) -> tuple[float, float, float, float]:
        """Return a student's squared L2 distance to p*, its excess NLL, its accuracy, and whether
        it learnt by coefficients other than 0.
        """
        log_s, p = self.student(teacher, way), self.truth.exp()
        apart = (log_s.exp() - p).square().sum(-1).mean()
        excess = (p * (self.truth - log_s)).sum(-1).mean()
        right = p.gather(-1, log_s.argmax(-1, keepdim=True)).mean()
        accepted = any(map(any, self.fit(teacher, way).eps))
        return float(apart), float(excess), float(right), float(accepted)


def measured(number: int) -> dict[tuple[str, str], tuple[float, float, float, float]]:
    """Return what is measured in one seed, by teacher and way."""
    torch.set_num_threads(1)
    seed = Seed(number)
    return {
        (teacher, name): seed.measured(teacher, way)
        for teacher in seed.teachers
        for name, way in WAYS.items()
    }


def main() -> None:
    """Print a table for each measure: a row for each way, a column for each teacher."""
    count, workers = map(int, (*sys.argv[1:], *("10", "2")[len(sys.argv) - 1 :]))
    with ProcessPoolExecutor(workers) as pool:
        results = list(pool.map(measured, range(count)))
    found = {key: torch.tensor([r[key] for r in results]) for key in results[0]}
    teachers = dict.fromkeys(teacher for teacher, _ in found)
    cells: dict[str, Callable[[str, str], str]] = {
        "squared L2 to the truth, thousandths": lambda t, n: (
            f"{1000 * found[t, n][:, 0].mean():.1f}"
        ),
        "the same less that of vector scaling (standard error over seeds)": lambda t, n: difference(
            found[t, n] - found[t, "KL, vector scaling"]
        ),
        "excess NLL, thousandths of a nat": lambda t, n: f"{1000 * found[t, n][:, 1].mean():.1f}",
        "accuracy, %": lambda t, n: f"{100 * found[t, n][:, 2].mean():.1f}",
        "seeds in which coefficients were accepted": lambda t, n: (
            f"{found[t, n][:, 3].sum():.0f}" if WAYS[n].what == "eps" else ""
        ),
    }
    for title, cell in cells.items():
        rows: list[tuple[Cell, ...]] = [(name, *(cell(t, name) for t in teachers)) for name in WAYS]
        shown = [row for row in rows if any(row[1:])]
        head = ("student learns by", *teachers)
        print(Table(f"{count} seeds, {LABELS} labels: {title}", head, shown).markdown())


def difference(found: torch.Tensor) -> str:
    """Return the mean difference of L2 over seeds and its standard error, in thousandths."""
    values = 1000 * found[:, 0]
    if not values.any():
        return ""
    return f"{values.mean():+.1f} ({values.std() / len(values) ** 0.5:.1f})"


if __name__ == "__main__":
    main()
