"""Adapters as a folder that Hugging Face's library `peft` loads, on top of the frozen model.

    FOLDER/adapter_config.json            rank, alpha and targets by their names there
           adapter_model.safetensors      A as [r, in], B as [out, r], rows of the control pieces
           apr_export.json                names of the files above, see `hf_folder`

The frozen model is the one that the training began with (`--init`), as a folder that `apr export`
wrote:

    base = AutoModelForCausalLM.from_pretrained("base")
    model = PeftModel.from_pretrained(base, "FOLDER")
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from apr_jax.errors import UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.storage import save_tensors
from apr_jax.train.checkpoint.hf_folder import check_folder, first_control_id, replace_files
from apr_jax.train.checkpoint.restored import Adapted

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Target -> name of the module in a layer of transformers.
_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_MODEL = "base_model.model"  # Under this name the model stands in peft's.


def export_adapters(adapted: Adapted, folder: Path) -> None:
    """Writes adapters as a folder, and replaces an earlier export in it.

    Raises:
      UsageError: the folder holds a file that no export wrote.
      UserError: the folder cannot be written.
    """
    check_folder(folder)
    with disk_errors(folder):
        replace_files(folder, {CONFIG: _described(adapted)}, further=(WEIGHTS,))
        try:
            save_tensors(dict(_tensors(adapted.adapters)), folder / WEIGHTS, {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the adapters to {folder}: {error}") from error


def _described(adapted: Adapted) -> dict[str, Any]:
    """Returns the content of adapter_config.json."""
    lora = adapted.lora
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": [
            module.partition(".")[2] for name, module in _MODULES.items() if name in lora.targets
        ],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    adapters = adapted.adapters
    if "control_embed" not in adapters:
        return described
    first = first_control_id(adapted.tokenizer)
    ids = list(range(first, first + len(adapters["control_embed"])))
    rows = {"embed_tokens": ids}
    if "control_unembed" in adapters:
        rows["lm_head"] = ids
    return described | {"trainable_token_indices": rows}


def _tensors(adapters: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each tensor of adapter_model.safetensors, with its name."""
    for name, module in _MODULES.items():
        if f"{name}_a" not in adapters:
            continue
        # Of each layer A is [in..., r] and B is [r, out...].
        layers = zip(adapters[f"{name}_a"], adapters[f"{name}_b"], strict=True)
        for index, (down, up) in enumerate(layers):
            rank = len(up)
            place = f"{_MODEL}.model.layers.{index}.{module}"
            yield (
                f"{place}.lora_A.weight",
                np.ascontiguousarray(down.reshape(-1, rank).T),
            )
            yield f"{place}.lora_B.weight", np.ascontiguousarray(up.reshape(rank, -1).T)
    rows = "token_adapter.trainable_tokens_delta"
    if "control_embed" in adapters:
        yield f"{_MODEL}.model.embed_tokens.{rows}", np.ascontiguousarray(adapters["control_embed"])
    if "control_unembed" in adapters:
        yield f"{_MODEL}.lm_head.{rows}", np.ascontiguousarray(adapters["control_unembed"].T)
