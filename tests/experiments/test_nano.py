"""What the results of scale nano have to show, as the documents conclude it from them."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "experiments" / "nano"


def test_serial_votes_equal_the_tree_at_equal_tokens():
    results = json.loads((FOLDER / "results.json").read_text())
    comparison = next(
        row
        for row in results["comparisons"]
        if row["comparison"].startswith("same total tokens: APR after RL, ")
    )
    assert comparison["low"] < 0 < comparison["high"]


def test_rl_teaches_early_model_to_spawn_and_solve():
    """It solves more than before beyond chance, and its trees have more children."""
    gaps = json.loads((FOLDER / "early.json").read_text())["gaps"]
    gains = [gap for gap in gaps if gap["other"] == "seed 0, T = 1"]
    assert len(gains) == 3
    for gain in gains:
        assert gain["accuracy"][1] > 0, "the lower end of the 95% interval"
        assert gain["children"][1] > 0, "the lower end of the 95% interval"
