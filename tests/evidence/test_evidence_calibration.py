"""The contest's error rates, on fewer cases than `benchmarks/comparison_calibration.py`."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scipy import stats

CASES = 150


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "comparison_calibration.py"
    spec = importlib.util.spec_from_file_location("comparison_calibration", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("spreads", [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (0.0, 2.0)])
def test_equals_rarely_make_a_winner_and_the_stated_difference_is_found(calibration, spreads):
    facts = calibration.calibrate(calibration.Scene(spreads, rows=300), CASES)
    assert facts["false_winners"] <= stats.binom.ppf(0.999, CASES, 0.05)
    assert 0.65 <= facts["pairs_found"] <= 0.92  # 0.8, three standard errors, and a little


def test_documents_and_four_methods(calibration):
    scene = calibration.Scene((1.0, 2.0, 0.0, 1.0), rows=300, rows_per_document=5)
    facts = calibration.calibrate(scene, CASES // 2)
    assert facts["contests_with_a_false_pair"] <= stats.binom.ppf(0.999, CASES // 2, 0.05)
    assert facts["false_winners"] <= facts["contests_with_a_false_pair"]
