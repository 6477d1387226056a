"""Other engines on the same weights: transformers, llama.cpp and vLLM, each in a process of its
own.

A process apart has thread pools of its own, and its library can neither clash with JAX nor write
into our output. The process (`peer_worker.py`) is told what to do in lines of JSON and waits for
the next one without using the processor, so peers and our engine can run by turns."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

from apr_jax.errors import UsageError, UserError
from apr_jax.io.terminal import Terminal
from apr_jax.model.config import ModelConfig
from apr_jax.model.hf import save_llama
from apr_jax.model.transformer import Params

_MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "vllm": "vllm"}
PEERS = tuple(_MODULES)
_REMEDY = "pip install 'apr_jax[bench]' installs the versions that work"


class Peer:
    """Greedy generation by another engine, in float32, on all cores. A context manager; not for two
    threads at once.
    """

    def __init__(self, name: str, folder: Path):
        self.name = name
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in close)
        # -P: else the modules beside the worker would hide others of the same name.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                str(Path(__file__).with_name("peer_worker.py")),
                name,
                str(folder),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(name),
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int) -> int:
        """Reads `batch` random prompts, goes on with each for exactly `new_tokens`; returns the
        number of tokens decoded.
        """
        return self._ask(
            do="decode", batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens
        )

    def generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        """What follows each context: up to and with the first of the `stop` tokens, or `most`
        tokens.
        """
        return self._ask(do="generate", contexts=contexts, stop=stop, most=most)

    def train(self, tokens: list[list[int]], compiled: bool) -> None:
        """One AdamW step on the cross-entropy of these rows; transformers alone can do it.

        Args:
          compiled: by `torch.compile`, else eager.
        """
        self._ask(do="train", tokens=tokens, compiled=compiled)

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
                self._process.wait(timeout=5)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdout, self._log):
            if stream:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, **order: Any) -> Any:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # It has died: reading its answer tells how.
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            last = next(
                (text.strip() for text in reversed(self._log.readlines()) if text.strip()),
                "nothing",
            )
            raise UserError(
                f"peer {self.name}: its process ended with status {status}, last saying: {last};"
                f" {_REMEDY}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(
                f"peer {self.name}: {answer['error']}" + answer["missing"] * f"; {_REMEDY}"
            )
        return answer["result"]


def open_peer(name: str, folder: Path) -> Peer:
    """Starts a peer on the weights that `save_llama` wrote to `folder`: seconds, for vLLM up to a
    minute (it compiles).
    """
    if name not in PEERS:
        raise UsageError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    return Peer(name, folder)


def installed(wanted: Sequence[str] = PEERS) -> list[str]:
    """Those of the wanted peers that can be imported; the others are named in one line on
    stderr.
    """
    names = [name for name in wanted if importlib.util.find_spec(_MODULES[name])]
    if left := [name for name in wanted if name not in names]:
        told = f"without {', '.join(left)}: pip install 'apr_jax[bench]' brings them"
        Terminal(stderr=True, soft_wrap=True).print(told, markup=False)
    return names


@contextlib.contextmanager
def opened(names: Sequence[str], params: Params, config: ModelConfig) -> Iterator[list[Peer]]:
    """The peers, on these weights."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"--peer {unknown[0]}: there are {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        save_llama(params, config, Path(folder))
        yield [stack.enter_context(open_peer(name, Path(folder))) for name in names]


def _environment(name: str) -> dict[str, str]:
    """What the engine's own guide recommends for a CPU, and nothing that reaches for a network."""
    own = {
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if name == "vllm":
        own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.is_file():
            own["LD_PRELOAD"] = ":".join(filter(None, (os.environ.get("LD_PRELOAD"), str(openmp))))
    # The number of devices that tests and commands give JAX is no business of a peer.
    return {
        key: value
        for key, value in os.environ.items()
        if key not in ("XLA_FLAGS", "OMP_NUM_THREADS")
    } | own
