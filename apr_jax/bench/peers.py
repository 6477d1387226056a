"""Runs other engines with the same weights: transformers, llama.cpp and vLLM.

Each engine has a process of its own (`peer_worker.py`), and so its own thread pools. Its library
can neither clash with JAX nor write into our output. The process takes orders as lines of JSON. It
waits for the next order without using the processor, so peers and our engine can run by turns.
"""

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
from apr_jax.model.hf import save_hf
from apr_jax.model.transformer import Params

_MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "vllm": "vllm"}
PEERS = tuple(_MODULES)
_REMEDY = "pip install 'apr_jax[bench]' installs the versions that work"


class Peer:
    """Greedy generation by another engine, on all cores and in the type of the model's computation.

    It is a context manager. Two threads must not use it at once.
    """

    def __init__(self, name: str, folder: Path):
        """Starts the process of an engine on the weights in `folder`."""
        self.name = name
        # `close` closes it.
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        worker = str(Path(__file__).with_name("peer_worker.py"))
        # Without -P the modules beside the worker would hide others of the same name.
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker, name, str(folder)],
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
        """Decodes exactly `new_tokens` tokens after each of `batch` random prompts.

        Returns:
          the number of tokens that were decoded.
        """
        return self._ask(
            do="decode", batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens
        )

    def generate(self, contexts: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
        """Generates what follows each context.

        Args:
          contexts: tokens to read.
          stop: tokens that end a sequence; they are part of it.
          most: the most tokens that are generated after a context.
        """
        return self._ask(do="generate", contexts=contexts, stop=stop, most=most)

    def train(self, tokens: list[list[int]], compiled: bool) -> None:
        """Takes one AdamW step on the cross-entropy of rows of tokens; only transformers can.

        Args:
          tokens: rows of equal length.
          compiled: whether the step is compiled by `torch.compile`; otherwise it runs eagerly.
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
        """Sends an order and waits for its answer."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # The process has died; reading its answer says why.
        return self._answer()

    def _answer(self) -> Any:
        """Reads the answer to an order.

        Raises:
          UserError: the process has died, or could not do what was ordered.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            printed = [text.strip() for text in self._log.readlines() if text.strip()]
            last = printed[-1] if printed else "nothing"
            raise UserError(
                f"peer {self.name}: its process ended with status {status}, last saying: {last};"
                f" {_REMEDY}"
            )

        answer = json.loads(line)
        if "error" in answer:
            message = f"peer {self.name}: {answer['error']}"
            if answer["missing"]:
                message += f"; {_REMEDY}"
            raise UserError(message)
        return answer["result"]


def open_peer(name: str, folder: Path) -> Peer:
    """Starts a peer on the weights that `save_hf` wrote to `folder`.

    That takes seconds; for vLLM, which compiles, up to a minute.

    Raises:
      UsageError: there is no such peer.
    """
    if name not in PEERS:
        raise UsageError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    return Peer(name, folder)


def installed(wanted: Sequence[str] = PEERS) -> list[str]:
    """Lists the wanted peers that can be imported, and names the others in a line on stderr."""
    names = [name for name in wanted if importlib.util.find_spec(_MODULES[name])]
    missing = [name for name in wanted if name not in names]
    if missing:
        line = f"without {', '.join(missing)}: pip install 'apr_jax[bench]' brings them"
        Terminal(stderr=True, soft_wrap=True).print(line, markup=False)
    return names


@contextlib.contextmanager
def opened(names: Sequence[str], params: Params, config: ModelConfig) -> Iterator[list[Peer]]:
    """Opens peers on a model's weights, and closes them at the end.

    Raises:
      UsageError: there is no such peer.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"--peer {unknown[0]}: there are {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        save_hf(params, config, Path(folder))
        yield [stack.enter_context(open_peer(name, Path(folder))) for name in names]


def _environment(name: str) -> dict[str, str]:
    """Returns the environment of an engine: what its guide recommends for a CPU, no network."""
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
    # Settings of JAX's own devices and threads must not reach a peer.
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("XLA_FLAGS", "OMP_NUM_THREADS")
    }
    return inherited | own
