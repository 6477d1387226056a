"""What a run saves, how it is checked, and the model files made from it.

    with Checkpoints(workdir, run) as checkpoints:       # manager.py: saving
        saved = checkpoints.restore_latest(blank)        # None in a new workdir
        checkpoints.save(state, metrics, data)

    restored = load_checkpoint("runs/nano/apr/rl")       # a run, one of its steps, or a file
    export_file(restored, Path("apr-rl.safetensors"))    # one small file
    export_folder(restored.pretrained, Path("apr-rl"))   # for `transformers`

    pretrained = import_folder(Path("SmolLM2-135M"))     # a model of Hugging Face
    save_pretrained(pretrained, Path("smollm2.safetensors"))
    load_pretrained("smollm2.safetensors")               # or whatever `load_checkpoint` takes

    export_adapters(load_adapters("runs/mine/sft"), Path("adapters"))      # for `peft`

    manager.py       saves steps
    step_files.py    the files of a step, and the steps of a run
    retention.py     which steps are kept, and which one is the best
    resume.py        what an interrupted run goes on from; damaged steps
    run.py           what stays the same through a run, so that no other run goes on from it
    load.py          the weights of a step, for evaluation and RL
    restored.py      `Restored`: the weights with all that evaluation and RL need of them;
                     `Pretrained`: the model alone; `Adapted`: adapters alone
    exported.py      a model in one file
    hf_folder.py, hf_import.py   folders of Hugging Face, out and in
    peft_folder.py   adapters as a folder for peft
    checksum.py      notices flipped bits

docs/checkpoints.md says what each fault does.
"""

from apr_jax.train.checkpoint.exported import (
    SUFFIX,
    export_file,
    load_exported,
    save_pretrained,
)
from apr_jax.train.checkpoint.hf_folder import check_folder, export_folder
from apr_jax.train.checkpoint.hf_import import import_folder
from apr_jax.train.checkpoint.load import load_adapters, load_checkpoint, load_pretrained
from apr_jax.train.checkpoint.manager import Checkpoints
from apr_jax.train.checkpoint.peft_folder import export_adapters
from apr_jax.train.checkpoint.restored import Adapted, Pretrained, Restored
from apr_jax.train.checkpoint.resume import Saved
from apr_jax.train.checkpoint.retention import BEST
from apr_jax.train.checkpoint.run import Run
from apr_jax.train.checkpoint.step_files import FOLDER, last_step, version_error

__all__ = [
    "BEST",
    "FOLDER",
    "SUFFIX",
    "Adapted",
    "Checkpoints",
    "Pretrained",
    "Restored",
    "Run",
    "Saved",
    "check_folder",
    "export_adapters",
    "export_file",
    "export_folder",
    "import_folder",
    "last_step",
    "load_adapters",
    "load_checkpoint",
    "load_exported",
    "load_pretrained",
    "save_pretrained",
    "version_error",
]
