"""A trained model in Python: load it, solve a problem, look at the tree.

    model = load()           # the library's own model of Countdown; or load("runs/mine/rl")
    tree = model.solve("54 2 93 34 -> 53")
    print(tree)              # what `apr solve` shows
    tree.correct             # True
    tree.trace["threads"]    # what every thread wrote, as in traces.jsonl

The model decodes on the devices of this machine, greedily.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

from apr_jax.evaluate.decoding import Decoding, task_of
from apr_jax.evaluate.runner import evaluate
from apr_jax.io.storage import as_path
from apr_jax.io.terminal import Terminal
from apr_jax.report.solve import grow_tree, show_tree
from apr_jax.report.viewer import write_tree_page
from apr_jax.scales import example_model
from apr_jax.tasks import Problem, load_problems
from apr_jax.threads import ThreadForest
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.checkpoint.restored import Restored


def load(path: str | Path | None = None) -> Model:
    """Loads the model of a training, of one of its steps, or of a file that `apr export` wrote.

    Args:
      path: the folder of a training, from which the best step is loaded, or else the last;
        `checkpoints/<step>` in such a folder; or an exported file. May be gs://. By default the
        library's own model of Countdown, as in `apr solve`.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    return Model(load_checkpoint(path or example_model()))


@dataclasses.dataclass(frozen=True, repr=False)
class SolvedTree:
    """A thread tree that a model grew for one problem. Printed, it is what `apr solve` shows.

    Attributes:
      model: name of the model: its method and its stage.
      problem: the problem.
      answer: what the root thread joined, as text.
      forest: tokens, log-probs and times of every thread, numpy arrays [1, T, ...].
      trace: the tree with texts and verdict, as a line of `traces.jsonl` has it.
    """

    model: str
    problem: Problem
    answer: str
    forest: ThreadForest
    trace: dict[str, Any]

    @property
    def correct(self) -> bool | None:
        """Whether the task's scorer accepts the answer; None if it gave no verdict."""
        correct: bool | None = self.trace["correct"]
        return correct

    @property
    def stated(self) -> str | None:
        """The answer as the task shows it; None if the text states no answer."""
        stated: str | None = self.trace["stated"]
        return stated

    @property
    def reward(self) -> float | None:
        """The reward of the answer, from 0 to 1; None if the scorer gave no verdict."""
        reward: float | None = self.trace["reward"]
        return reward

    def write_html(self, path: str | Path) -> None:
        """Writes the viewer of the tree, an HTML page that loads nothing from elsewhere."""
        write_tree_page(self.trace, self.model, as_path(path))

    def __str__(self) -> str:
        """Returns what `apr solve` prints, without colours."""
        text = io.StringIO()
        console = Terminal(file=text, color_system=None, force_terminal=False, force_jupyter=False)
        show_tree(self.forest, self.trace, console)
        return text.getvalue().rstrip("\n")

    __repr__ = __str__


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A trained model that solves problems on this machine's devices.

    Attributes:
      restored: contents of the checkpoint: parameters, tokenizer, and the config of the training.
    """

    restored: Restored

    @property
    def name(self) -> str:
        """The method and the stage of the training, for example "apr-rl"."""
        return f"{self.restored.method}-{self.restored.stage}"

    def __repr__(self) -> str:
        """Returns the model's name, its step, and the path it was loaded from."""
        return f"Model({self.name}, step {self.restored.step} of {self.restored.path})"

    def solve(self, problem: str | Problem) -> SolvedTree:
        """Decodes one problem greedily.

        The first call compiles the rollout; later calls reuse it.

        Args:
          problem: text as `apr solve` takes it, for example "54 2 93 34 -> 53", or a `Problem`.

        Raises:
          UsageError: the text is no problem, or it does not fit the model's window.
        """
        if isinstance(problem, str):
            problem = task_of(self.restored).parse(problem)

        forest, answer, trace = grow_tree(self.restored, problem)
        return SolvedTree(self.name, problem, answer, forest, trace)

    def evaluate(
        self,
        problems: str | Path | list[Problem],
        out: str | Path,
        progress: bool = True,
        **decoding: Any,
    ) -> dict[str, Any]:
        """Answers many problems and scores the answers, as `apr eval` does.

        Args:
          problems: a problems file, or a list of problems.
          out: folder for `traces.jsonl` and `summary.json`. If it holds an interrupted evaluation
            with the same settings, that one goes on.
          progress: whether to show a bar on standard error.
          **decoding: fields of `Decoding`, for example `samples=8, temperature=1.0`. The default is
            one greedy tree for each problem.

        Returns:
          the summary, as `summary.json` holds it.

        Raises:
          UsageError: a problem or a field of `Decoding` does not fit the model, or `out` holds an
            evaluation with other settings.
          UserError: another evaluation is writing to `out`, or too many answers have no verdict.
        """
        if not isinstance(problems, list):
            problems = load_problems(as_path(problems), task_of(self.restored))
        return evaluate(self.restored, problems, as_path(out), Decoding(**decoding), progress)
