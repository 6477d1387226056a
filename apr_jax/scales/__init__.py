"""The experiment files of the scales demo, nano, mini and paper, and a trained model to try.

They are kept once, in `experiments/` of the repository. The wheel has copies of them in this folder
(setup.py makes them), so that `--scale nano` and `apr solve` work wherever the library is
installed.
"""

from pathlib import Path

from apr_jax.errors import UsageError

SCALES = ("demo", "nano", "mini", "paper")
_PACKAGE = Path(__file__).parent
_CLONE = _PACKAGE.parents[1] / "experiments"


def example_model() -> Path:
    """Returns the file of the model that the library brings: APR of scale mini, after RL."""
    packaged = _PACKAGE / "apr-rl.safetensors"
    return packaged if packaged.is_file() else _CLONE / "mini" / packaged.name


def scale_file(scale: str) -> Path:
    """Finds the experiment file of a scale.

    It is the user's own, `experiments/<scale>.py` in the current folder, or else the library's.

    Raises:
      UsageError: there is no such scale.
    """
    files = [Path("experiments") / f"{scale}.py"]
    if scale in SCALES:
        files += [_PACKAGE / f"{scale}.py", _CLONE / f"{scale}.py"]
    for file in files:
        if file.is_file():
            return file
    raise UsageError(
        f"scale {scale!r}: must be one of {', '.join(SCALES)}, or a file in ./experiments"
    )
