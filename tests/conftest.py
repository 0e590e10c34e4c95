"""What every test runs under: CPU, eight devices, a compilation cache, and strictness."""

import os
from pathlib import Path

# Before jax is imported, which reads them once. A user's XLA_FLAGS come last, so they win. Machine
# code that is not optimised is made in a third of the time, and most of the suite's time goes
# there; whole runs of the slow tests are children without these flags, optimised as a user's are.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXTRAIN_TEST_PLATFORM", "cpu")
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxtrain" / "tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared_data() -> Path:
    """The folder of data that is not committed; the test is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"{SHARED / 'data'} is not here; it holds data that is not committed")
    return SHARED / "data"
