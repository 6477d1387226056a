"""What README says of scale nano is what `make demo` found."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "nano"


def test_readme_has_the_results_of_the_demo():
    results = json.loads((FOLDER / "results.json").read_text())
    sentence = re.search(r"\*\*Scale nano\*\*.*?\n\n", (ROOT / "README.md").read_text(), re.S)[0].replace("\n", " ")
    shares = [
        f"{100 * results['main'][name]['accuracy']:.1f}%" for name in ("sos+-sft", "sos+-rl", "apr-sft", "apr-rl")
    ]
    assert "SoS+ {} and {} after RL, APR {} and {}.".format(*shares) in sentence
    claim = next(row for row in results["claims"] if row["claim"].startswith("same total tokens: APR after RL, "))
    votes = claim["claim"].partition("SoS+ after RL cons@")[2]
    told = (
        f"votes over {votes} samples does as well as APR at equal total tokens ({{}}% against {{}}% at temperature 1)"
    )
    assert told.format(*(f"{100 * claim[side]:.1f}" for side in ("other", "one"))) in sentence
    assert claim["low"] < 0 < claim["high"]
