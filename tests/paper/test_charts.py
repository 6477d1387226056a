"""Figures look the same whatever the machine's, the notebook's or the caller's settings of
matplotlib are.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apr_jax.paper import charts

ROOT = Path(__file__).parents[2]
FOREIGN = {
    "text.usetex": True,  # There need be no LaTeX.
    "savefig.bbox": "tight",
    "savefig.format": "pdf",
    "figure.dpi": 300.0,
    "font.family": ["serif"],
    "axes.facecolor": "red",
    "lines.linestyle": "--",
}


@charts.styled
def drawn():
    figure, axes = charts.canvas(1)
    axes.plot([1, 2], [3, 5], label="a_b, 50%")
    axes.legend()
    return figure


def files(stem):
    charts.save(drawn(), stem)
    return [(stem.parent / f"{stem.name}.{ending}").read_bytes() for ending in ("png", "svg")]


def test_matplotlib_settings_of_the_caller_have_no_effect(tmp_path):
    """They are left as they were."""
    expected = files(tmp_path / "plain")
    svg = charts.to_svg(drawn(), "label")
    matplotlib = charts.matplotlib
    with matplotlib.rc_context(FOREIGN):
        assert files(tmp_path / "foreign") == expected
        assert charts.to_svg(drawn(), "label") == svg
        assert {name: matplotlib.rcParams[name] for name in FOREIGN} == FOREIGN


@pytest.mark.thorough
@pytest.mark.parametrize(
    "backend",
    ["module://a_backend_that_nobody_installed", pytest.param("svg", marks=pytest.mark.slow)],
)
def test_figures_are_drawn_in_the_environment_of_a_notebook(tmp_path, backend):
    """Whose backend matplotlib refuses to be imported with, if it is not installed; one that is
    there stays chosen.
    """
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.bbox: tight\n")
    code = (
        "import sys; sys.path.insert(0, 'tests/paper'); import test_charts, os, matplotlib; from"
        f" pathlib import Path; test_charts.files(Path({str(tmp_path / 'there')!r}));"
        " print(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'])"
    )
    environment = os.environ | {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    in_environment, in_force = ended.stdout.split()
    assert in_environment == backend
    assert in_force == backend or "nobody" in backend

    expected = files(tmp_path / "here")
    assert [(tmp_path / f"there.{ending}").read_bytes() for ending in ("png", "svg")] == expected
