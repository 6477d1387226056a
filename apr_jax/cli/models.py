"""The commands for a model: `apr eval`, `apr solve`, `apr export` and `apr import`."""

from pathlib import Path
from typing import Annotated

import typer

from apr_jax.cli.flags import ANYWHERE, HERE, NEW_FILE, Checkpoint, Json
from apr_jax.cli.resumable import resumable
from apr_jax.errors import UsageError
from apr_jax.io.json_files import write_json
from apr_jax.io.runtime import start

models_app = typer.Typer()


@models_app.command(
    "eval",
    epilog=(
        "Example: apr eval --checkpoint runs/nano/apr/rl --problems runs/nano/data/test.jsonl --out"
        " runs/nano/mine"
    ),
)
def evaluate(
    checkpoint: Checkpoint,
    problems: Annotated[
        Path, typer.Option(help="Problems file, one JSON object a line.", **ANYWHERE)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for traces.jsonl and summary.json.", **ANYWHERE)
    ],
    condition: Annotated[
        int | None,
        typer.Option(
            help=(
                "A number that the prompts state, if the model was trained with one: of child"
                " threads (Countdown's APR) or of window bins (SoS+)."
            ),
            min=0,
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Positions a thread may occupy, instead of the model's own.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Trees for each problem.", min=1)] = 1,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the sampling; 0 is greedy.", min=0.0)
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from the k most likely tokens only; 0 is all.", min=0)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the fewest likely tokens that reach this probability.",
            min=0.01,
            max=1.0,
        ),
    ] = 1.0,
    force_children: Annotated[
        int | None,
        typer.Option(
            help="Make every root spawn exactly this many children, over all its spawns.", min=0
        ),
    ] = None,
    constrain: Annotated[
        bool | None,
        typer.Option(
            "--constrain/--no-constrain",
            help=(
                "Sample no token that the thread protocol does not allow; by default as the model"
                " was trained."
            ),
            show_default=False,
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Evaluate a checkpoint on a problems file; nothing else is needed."""
    start()
    from apr_jax.evaluate.decoding import Decoding, task_of
    from apr_jax.evaluate.runner import evaluate as run
    from apr_jax.report.terminal_tables import print_table
    from apr_jax.tasks import load_problems
    from apr_jax.train.checkpoint import load_checkpoint

    with resumable(f"the trees that were decoded are in {out}"):
        restored = load_checkpoint(checkpoint)
        loaded = load_problems(problems, task_of(restored))
        decoding = Decoding(
            samples, temperature, top_k, top_p, window, condition, force_children, constrain
        )
        summary = run(restored, loaded, out, decoding)
    if json:
        write_json(json, summary)
    print_table({f"{restored.method} {restored.stage}": summary})
    typer.echo(f"traces and summary: {out}")


@models_app.command(epilog='Example: apr solve "54 2 93 34 -> 53" --html tree.html')
def solve(
    problem: Annotated[
        str,
        typer.Argument(
            help=(
                "The problem as its task writes it; for Countdown numbers and target:"
                ' "22 26 2 -> 46".'
            ),
            show_default=False,
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help=(
                "A run's folder (its best or last step) or one step, or an exported file. May be"
                " gs://. By default the library's own model of Countdown, trained at scale mini."
            ),
            **ANYWHERE,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the viewer of the tree to this file.", **NEW_FILE)
    ] = None,
    json: Json = None,
) -> None:
    """Solve one problem and show its thread tree."""
    start()
    from apr_jax.evaluate.decoding import task_of
    from apr_jax.report.solve import solve as run
    from apr_jax.scales import example_model
    from apr_jax.train.checkpoint import load_checkpoint

    restored = load_checkpoint(checkpoint or example_model())
    trace = run(restored, task_of(restored).parse(problem), html)
    if json:
        write_json(json, trace)


@models_app.command(
    epilog=(
        "Example: apr export --checkpoint runs/mini/apr/rl --out experiments/mini/apr.safetensors"
    )
)
def export(
    checkpoint: Checkpoint,
    out: Annotated[
        Path,
        typer.Option(
            help=(
                "FILE.safetensors: one small file, which every --checkpoint takes. Any other name:"
                " a new folder, or that of an earlier export, in the form of Hugging Face."
            ),
            **HERE,
        ),
    ],
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter",
            help=(
                "Write a folder with the adapters of a training alone, for the library peft; the"
                " model to which they are added is the --init of that training."
            ),
        ),
    ] = False,
) -> None:
    """Write a model as one small file (bfloat16), or as a Hugging Face folder with its tokenizer.

    Transformers and vLLM load the folder. Its architecture is Llama, or that of an imported model,
    whose tokens have their own ids again. llama.cpp needs a GGUF file; its converter was not tried
    on this folder. Each of these engines writes a single thread: none of them starts the children
    of a <spawn> block.
    """
    from apr_jax.train.checkpoint import (
        export_adapters,
        load_adapters,
        load_checkpoint,
        load_pretrained,
    )
    from apr_jax.train.checkpoint.exported import SUFFIX, export_file
    from apr_jax.train.checkpoint.hf_folder import (
        check_folder,
        export_folder,
        tokenizer_warning,
    )

    is_file = out.suffix == SUFFIX
    if is_file and adapter:
        raise UsageError(f"--out {out}: must be the name of a folder, because of --adapter")
    if not is_file:
        try:
            check_folder(out)
        except UsageError as error:
            raise UsageError(f"--out {error}") from None

    start()
    if adapter:
        export_adapters(load_adapters(checkpoint), out)
        typer.echo(f"adapters: {out}")
    elif is_file:
        export_file(load_checkpoint(checkpoint), out)
        typer.echo(f"model: {out}")
    else:
        pretrained = load_pretrained(checkpoint)
        export_folder(pretrained, out)
        typer.echo(f"model and tokenizer: {out}")
        warning = tokenizer_warning(pretrained)
        if warning:
            typer.echo(f"warning: {warning}", err=True)


@models_app.command(
    "import", epilog="Example: apr import models/SmolLM2-135M --out smollm2.safetensors"
)
def import_model(
    folder: Annotated[
        Path,
        typer.Argument(
            help=(
                "Folder of a Hugging Face model: config.json, tokenizer.json and one or several"
                " safetensors files."
            ),
            parser=HERE["parser"],
            metavar="FOLDER",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="FILE.safetensors, for `apr train sft --init`.", **NEW_FILE)
    ],
) -> None:
    """Read a pretrained Llama, Qwen2 or Qwen3 with its tokenizer, to train it on threads.

    Ten control pieces get rows in front of the embedding; no bit of the weights is lost.
    """
    from apr_jax.train.checkpoint.exported import SUFFIX, save_pretrained
    from apr_jax.train.checkpoint.hf_import import import_folder

    if out.suffix != SUFFIX:
        raise UsageError(f"--out {out}: must end in {SUFFIX}")
    start()
    from apr_jax.model.transformer import count_params

    pretrained = import_folder(folder)
    save_pretrained(pretrained, out)
    count, _ = count_params(pretrained.params)
    typer.echo(f"model: {out} ({count:,} parameters, {pretrained.tokenizer.vocab_size:,} tokens)")
