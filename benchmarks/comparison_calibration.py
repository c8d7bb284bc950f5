"""How often the comparison names a false winner, and how often it finds what it says it can.

Simulated methods go through the very code that judges real ones (`hold_contest`). Each row has a
difficulty, shared by all methods; each method has its own reaction to the row, each seed its own
luck on the row, and each seed a shift of the whole run: the spread between seeds. Documents, where
there are any, share part of the difficulty and of the methods' reactions.

    python benchmarks/comparison_calibration.py --json --cases 1000

Figures and their meaning: docs/statistics.md.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import Pool

import numpy as np
from scipy.special import ndtri

from loralab.evidence import Contest, Pair, hold_contest

FIRST = "method 0"  # the one that gets a lead
ACCURACY = 0.8
DIFFICULTY, REACTION, LUCK = 0.55, 0.15, 0.30  # shares of the variance between rows
DOCUMENT = 0.3  # the documents' share of difficulty and of reaction, where rows come in documents
NLL_STEEPNESS = 2.0  # of the log-likelihood over the latent score


@dataclass(frozen=True)
class Scene:
    """A contest to repeat: `spreads` are the methods' spreads between seeds, in points."""

    spreads: tuple[float, ...]
    rows: int = 1000
    seeds: int = 3
    rows_per_document: int = 1
    same_seed_correlation: float = 0.0  # of two methods' shifts at one seed (shared data order)
    lead: float = 0.0  # how much more accurate the first method is, as a fraction


SCENES = [
    *(Scene((spread,) * 4, rows) for rows in (300, 1000, 2500) for spread in (0.0, 1.0, 2.0)),
    *(Scene((spread,) * 2, rows) for rows in (300, 1000, 2500) for spread in (0.0, 1.0, 2.0)),
    Scene((2.0, 0.0, 1.0, 0.0)),
    Scene((0.0, 2.0)),
    Scene((0.0, 2.0), rows=2500),
    Scene((0.0, 1.0), rows=1000),
    *(Scene((spread,) * 4, rows_per_document=10) for spread in (0.0, 1.0, 2.0)),
    *(Scene((spread,) * 2, rows_per_document=10) for spread in (0.0, 1.0, 2.0)),
    Scene((1.0, 1.0), same_seed_correlation=0.8),
    Scene((1.0, 1.0, 1.0, 1.0), seeds=5),
    Scene((1.0, 1.0), seeds=5),
]


def simulate(scene: Scene, generator: np.random.Generator) -> Contest:
    """One contest of the scene."""
    methods, shape = len(scene.spreads), (len(scene.spreads), scene.seeds, scene.rows)
    threshold = ndtri(ACCURACY)
    slope = np.exp(-(threshold**2) / 2) / np.sqrt(2 * np.pi)  # accuracy per unit of latent score
    level = np.full(methods, threshold)
    level[0] = ndtri(min(ACCURACY + scene.lead, 0.9999))
    documents = np.arange(scene.rows) // scene.rows_per_document

    def normal(*size: int) -> np.ndarray:
        """Standard normal over rows; correlated inside documents where there are any."""
        own = generator.standard_normal((*size, scene.rows))
        if scene.rows_per_document == 1:
            return own
        shared = generator.standard_normal((*size, documents[-1] + 1))[..., documents]
        return np.sqrt(1 - DOCUMENT) * own + np.sqrt(DOCUMENT) * shared

    alike = scene.same_seed_correlation
    shift = np.sqrt(alike) * generator.standard_normal(scene.seeds) + np.sqrt(
        1 - alike
    ) * generator.standard_normal((methods, scene.seeds))
    shift *= np.array(scene.spreads)[:, None] / 100 / slope
    latent = (
        level[:, None, None]
        + np.sqrt(DIFFICULTY) * normal()
        + np.sqrt(REACTION) * normal(methods, 1)
        + np.sqrt(LUCK) * generator.standard_normal(shape)
        + shift[:, :, None]
    )
    names = [f"method {index}" for index in range(methods)]
    nll = np.logaddexp(0, -NLL_STEEPNESS * latent)
    groups = documents if scene.rows_per_document > 1 else None
    return hold_contest(
        dict(zip(names, latent > 0, strict=True)), dict(zip(names, nll, strict=True)), groups
    )


def repeat(scene: Scene, cases: int, seed: int) -> Iterator[Contest]:
    generator = np.random.default_rng(seed)
    return (simulate(scene, generator) for _ in range(cases))


def calibrate(scene: Scene, cases: int, seed: int = 0) -> dict:
    """False winners among equals; then leads of the sizes that those contests stated, and finds.

    First the first method leads by the median `detectable_difference` of its pairs, and
    `pairs_found` is the share of them that comes out significant; then it leads by the median
    `detectable_lead`, and `winner_found` is the share of contests that it wins.
    """
    false_winners = false_pairs = 0
    differences, leads = [], []
    for contest in repeat(scene, cases, seed):
        false_winners += contest.winner is not None
        false_pairs += any(pair.better for pair in contest.accuracy)
        differences += [pair.detectable_difference for pair in own_pairs(contest)]
        leads.append(contest.detectable_lead(FIRST))
    difference, lead = float(np.median(differences)), float(np.median(leads))
    found = [
        pair.better == FIRST
        for contest in planted(scene, difference, cases, seed + 1)
        for pair in own_pairs(contest)
    ]
    won = [contest.winner == FIRST for contest in planted(scene, lead, cases, seed + 2)]
    facts = asdict(scene)
    del facts["lead"]
    return {
        **facts,
        "cases": cases,
        "false_winners": false_winners,
        "contests_with_a_false_pair": false_pairs,
        "detectable_difference": difference,
        "pairs_found": float(np.mean(found)) if found else None,
        "detectable_lead": lead,
        "winner_found": float(np.mean(won)) if won else None,
    }


def own_pairs(contest: Contest) -> list[Pair]:
    return [pair for pair in contest.accuracy if pair.a == FIRST]


def planted(scene: Scene, lead: float, cases: int, seed: int) -> Iterable[Contest]:
    """Contests with this lead; none where the leader would come too close to 100 %."""
    return [] if ACCURACY + lead > 0.98 else repeat(replace(scene, lead=lead), cases, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Calibration of the comparison.")
    parser.add_argument("--cases", type=int, default=1000, help="simulated contests a scene")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with Pool(arguments.processes) as pool:
        rows = pool.map(partial(calibrate, cases=arguments.cases), SCENES, chunksize=1)
    if arguments.json:
        facts = {"numpy": np.__version__, "python": platform.python_version()}
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"seconds": seconds, **facts, "scenes": rows}, indent=1))
        return
    titles = ["spreads", "rows", "a document", "seeds", "false winners", "false pairs"]
    titles += ["difference stated", "found", "lead stated", "won"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        print(f"| {' | '.join(cells(row))} |")


def cells(row: dict) -> list[str]:
    """A scene's row of the table; spreads and sizes in points."""
    spreads = " / ".join(f"{spread:g}" for spread in row["spreads"])
    if row["same_seed_correlation"]:
        spreads += f" (correlated {row['same_seed_correlation']:g})"
    counts = ("rows", "rows_per_document", "seeds", "false_winners", "contests_with_a_false_pair")
    return [
        spreads,
        *(str(row[key]) for key in counts),
        f"{100 * row['detectable_difference']:.1f}",
        percent(row["pairs_found"]),
        f"{100 * row['detectable_lead']:.1f}",
        percent(row["winner_found"]),
    ]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


if __name__ == "__main__":
    main()
