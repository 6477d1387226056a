"""Decode one thread of an exported model with `transformers` alone, without apr_jax.

    apr export --checkpoint runs/mine/rl --out exported
    python examples/decode_with_transformers.py exported "22,26,2:46"

The prompt is the text that the task gives the root thread. `generate` stops where the thread ends,
at <eos>, or where it has written its messages, at </spawn>. Children are not started: that takes a
rollout, such as `apr solve`. Needs `pip install 'apr_jax[hf]'`.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def decode_thread(folder, prompt, most_tokens=256):
    """Returns the text of a thread, greedily decoded, with its control pieces spelled out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoded = tokenizer(prompt, return_tensors="pt")  # Begins with <bos>, as every thread does.
    with torch.inference_mode():
        ids = model.generate(**encoded, max_new_tokens=most_tokens, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=False)


def printable(text):
    """Returns a text in which characters that would steer a terminal are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


if __name__ == "__main__":
    print(printable(decode_thread(*sys.argv[1:3])))
