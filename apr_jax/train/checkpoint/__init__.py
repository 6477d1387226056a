"""What a run saves, how it is checked, and the model files made from it.

    with Checkpoints(workdir, run) as checkpoints:       # manager.py
        saved = checkpoints.restore_latest(blank)        # None in a new workdir
        checkpoints.save(state, metrics, data)

    restored = load_checkpoint("runs/nano/apr/rl")       # a run, one of its steps, or a file
    export_file(restored, Path("apr-rl.safetensors"))    # exported.py: one small file
    export_folder(restored, Path("apr-rl"))              # hf_folder.py: for `transformers`

`Restored` (restored.py) holds the weights with all that evaluation and RL need of them.
checksum.py notices flipped bits. docs/checkpoints.md says what each fault does.
"""

from apr_jax.train.checkpoint.exported import SUFFIX, export_file, load_exported
from apr_jax.train.checkpoint.hf_folder import check_folder, export_folder
from apr_jax.train.checkpoint.manager import (
    FOLDER,
    Checkpoints,
    Run,
    Saved,
    last_step,
    load_checkpoint,
)
from apr_jax.train.checkpoint.restored import Restored

__all__ = [
    "FOLDER",
    "SUFFIX",
    "Checkpoints",
    "Restored",
    "Run",
    "Saved",
    "check_folder",
    "export_file",
    "export_folder",
    "last_step",
    "load_checkpoint",
    "load_exported",
]
