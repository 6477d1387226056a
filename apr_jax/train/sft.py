"""Supervised training: the model imitates demonstrations.

In a validation, the model itself answers problems.
"""

import functools
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.data.build import check_built, check_files, file_method, training_sum
from apr_jax.data.pipeline import Batches, LocalRows, sft_batches, steps_of_an_epoch
from apr_jax.errors import UsageError
from apr_jax.io.storage import as_path, local_copy
from apr_jax.io.terminal import Terminal
from apr_jax.model.transformer import Params, cast_weights, init_params
from apr_jax.tasks import load_problems, make_task
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.checkpoint import Pretrained, Run, load_pretrained
from apr_jax.train.checkpoint.checksum import digest
from apr_jax.train.distributed import HeldRows, merge
from apr_jax.train.grader import Grader, grading
from apr_jax.train.loop import LastBatches, Stage, Stopping
from apr_jax.train.lora import new_adapters, place_frozen
from apr_jax.train.metrics.flops import measure_peak
from apr_jax.train.metrics.trackers import require_tracker
from apr_jax.train.optimizer import clipped_updates, make_optimizer
from apr_jax.train.session import adopt_network, build_mesh, read_tokenizer, train
from apr_jax.train.state import TrainState, init_state
from apr_jax.train.step import check_divides, make_sft_step, place_rows, place_whole


def train_sft(
    config: Experiment,
    data_dir: Path,
    workdir: Path,
    method: str,
    progress: bool = True,
    profile: int | None = None,
    init: Path | str | None = None,
) -> TrainState:
    """Trains the model of `config` on the demonstrations of `method`, or resumes such a run.

    Args:
      config: the experiment.
      data_dir: folder that `apr data build` wrote.
      workdir: folder of the run, for checkpoints, metrics and config.
      method: the method of the demonstrations.
      progress: whether the terminal shows a progress bar.
      profile: step of which a profile is written, or None.
      init: the model to start from, for example one that `apr import` wrote; None starts from
        random weights. The data must be built with its tokenizer.

    Raises:
      UsageError: the data are of another config or tokenizer, `init` holds another network or is
        missing where adapters are trained, the devices do not divide the rows, the tracker is not
        installed, or the run has no such step to profile.
      UserError: there are no data, `init` cannot be loaded, the workdir belongs to another run, the
        disk is full, or too many updates were skipped.
      KeyboardInterrupt, SystemExit: the run was interrupted; it is saved.
    """
    require_tracker(config.train.tracker)
    _check_adapters(config, init)
    start = load_pretrained(init) if init is not None else None
    config = _with_network(config, start)
    sft = config.train.sft
    mesh = build_mesh(config)
    check_divides("train.sft.batch_rows", sft.batch_rows, mesh)
    peak = measure_peak(mesh, config.model.dtype)  # While the devices have nothing else to do.
    check_built(config, as_path(data_dir))
    here = local_copy(as_path(data_dir), "data.json")
    check_files(here)
    tokenizer = read_tokenizer(here)
    if start is not None:
        _check_tokenizer(start, tokenizer, data_dir)
    params = _first_params(config, start, tokenizer.vocab_size)
    base = place_frozen(params, sft.lora, mesh) if start else None
    trainer = _Trainer(config, here, method, mesh, base)
    if sft.epochs and jax.process_index() == 0:
        Terminal(stderr=True).print(
            f"sft: train.sft.epochs={sft.epochs:g} of {method} are {trainer.steps:,} steps of"
            f" {sft.batch_rows} rows",
            soft_wrap=True,
        )

    origin = digest(start.params) if start else ""
    adapters = new_adapters(params, sft.lora, config.seed)
    # `train` gets the only reference to the first state, so that it can free its memory, and nobody
    # keeps the weights on the host.
    first = [init_state(place_whole(params, mesh), trainer.optimizer, mesh, adapters)]
    del start, params

    opened: AbstractContextManager[Grader | None] = nullcontext()
    if sft.validate_every:
        problems = load_problems(here / "validation.jsonl", make_task(config.task))
        opened = grading(config, tokenizer, problems[: sft.validation], mesh)
    with opened as grader:
        return train(
            Run(
                config,
                method,
                "sft",
                tokenizer,
                origin,
                file_method(config, here),
                data=training_sum(here, method),
            ),
            as_path(workdir),
            first.pop(),
            Stage(
                name="sft",
                steps=trainer.steps,
                advance=trainer.advance,
                save_every=sft.save_every,
                max_consecutive_skipped=config.train.max_consecutive_skipped,
                data_state=trainer.data_state,
                batch=trainer.last_batches.of,
                host_seconds=lambda: trainer.waited,
                validate=grader.validate if grader else None,
                sample=grader.sample if grader else None,
                validates_first=False,  # Weights that never saw a demonstration answer no problem.
                validate_every=sft.validate_every,
            ),
            restore_data=trainer.restore_data,
            log_every=sft.log_every,
            counted=("tokens",),
            shown=("loss", "entropy", "validation_accuracy"),
            progress=progress,
            peak=peak,
            profile=profile,
        )


def _check_adapters(config: Experiment, init: Path | str | None) -> None:
    """Raises UsageError if adapters are to be added to random weights."""
    rank = config.train.sft.lora.rank
    if rank and init is None:
        raise UsageError(
            f"config train.sft.lora.rank={rank}: adapters are added to a trained model; give it by"
            " --init, or set the rank to 0 to train all weights"
        )


def _with_network(config: Experiment, start: Pretrained | None) -> Experiment:
    """Returns the experiment with the network of the model to start from, if there is one.

    Raises:
      UsageError: there is none and the experiment leaves its network open, or they disagree.
    """
    if start is not None:
        return adopt_network(config, start.model, start.path)
    if config.model.is_open:
        raise UsageError(
            "config model: leaves its sizes open; give the model to start from by --init, or give"
            " the sizes (model.layers, model.width and so on)"
        )
    return config


def _first_params(config: Experiment, start: Pretrained | None, vocab: int) -> Params:
    """Returns the weights with which a run begins: those of a model, or random ones."""
    if start is not None:
        return cast_weights(start.params, config.model.param_dtype)
    init = jax.jit(init_params, static_argnums=(0, 1))
    key = run_key(config.seed, Domain.WEIGHTS)
    # They pass through the host, so that several processes lay out the same values on their mesh.
    params: Params = jax.device_get(init(config.model, vocab, key))
    return params


def _check_tokenizer(start: Pretrained, tokenizer: Tokenizer, data_dir: Path) -> None:
    """Raises UsageError if the data were built with another tokenizer than the model's."""
    if tokenizer.to_bytes() != start.tokenizer.to_bytes():
        raise UsageError(
            f"data {data_dir}: was built with another tokenizer than that of {start.path}; build it"
            f" by `apr data build --init {start.path}`"
        )


class _Trainer:
    """What a supervised step needs besides the state: the optimizer and the batches.

    Attributes:
      steps: steps of the whole run.
      waited: seconds for which the last step waited for its batch.
      optimizer: the optimizer.
      last_batches: the batches of the last two steps.
    """

    def __init__(
        self, config: Experiment, data_dir: Path, method: str, mesh: Mesh, base: Any = None
    ):
        sft = config.train.sft
        length = config.limits.max_thread_tokens

        def open_stream(stream: int) -> Batches:
            rows = sft.batch_rows // sft.streams
            return sft_batches(data_dir, method, rows, length, config.seed, stream, sft.streams)

        self._steps_of_an_epoch = steps_of_an_epoch(
            data_dir, method, sft.batch_rows, length, config.seed, sft.streams
        )
        self._epochs = sft.epochs
        self.steps = sft.steps or math.ceil(sft.epochs * self._steps_of_an_epoch)

        self._mesh = mesh
        self._batch_rows = sft.batch_rows
        held = HeldRows.of(sft.batch_rows, mesh).mine.tolist()
        self._batches = LocalRows(open_stream, sft.streams, sft.batch_rows, held)
        self._clip = sft.optimizer.clip
        self.optimizer = make_optimizer(sft.optimizer, self.steps)
        update: Any = make_sft_step(config.model, self.optimizer, mesh, sft.lora)
        self._update = update if base is None else functools.partial(update, base=base)
        self.last_batches = LastBatches()
        self.waited = 0.0

    def advance(
        self, state: TrainState, step: int, stopping: Stopping
    ) -> tuple[TrainState, dict[str, Any]]:
        """Takes one step: reads a batch and updates the model on it."""
        del stopping  # A step is short, so it is finished.

        began = time.perf_counter()
        rows = next(self._batches)
        self.waited = time.perf_counter() - began
        self.last_batches.keep(step + 1, vars(rows))

        placed = place_rows(rows, self._batch_rows, self._mesh)
        state, metrics = self._update(state, placed)
        clipped = clipped_updates([metrics["grad_norm"]], self._clip)
        measured = {
            "data_seconds": self.waited,
            "epochs": (step + 1) / self._steps_of_an_epoch,
            "clipped_updates": clipped,
        }
        return state, metrics | measured

    def data_state(self) -> dict[str, Any]:
        """Returns where all streams stand, of all processes, and the length of the run.

        The learning rates follow from the length, so it must not change.
        """
        return {
            "streams": merge(self._batches.get_state()),
            "epochs": self._epochs,
            "steps": self.steps,
        }

    def restore_data(self, saved: dict[str, Any]) -> None:
        """Goes on from what `data_state` returned.

        Raises:
          UsageError: the same number of epochs was another number of steps when the run began.
        """
        if self._epochs and saved["epochs"] == self._epochs and saved["steps"] != self.steps:
            raise UsageError(
                f"train.sft.epochs={self._epochs:g}: were {saved['steps']} steps when this run"
                f" began, are {self.steps} now; give the folder of the data that it began with"
            )
        self._batches.set_state(saved["streams"])
