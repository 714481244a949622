"""A lease's environment, and the framework that may have started CUDA already."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from libclient import env
from libclient.errors import CudaAlreadyStarted
from libclient.framework import empty_cache

GRANT = {"CUDA_VISIBLE_DEVICES": "GPU-0"}


class Torch(SimpleNamespace):
    """What of the framework is asked: whether CUDA has started, and to give its cache back."""

    def __init__(self, started: bool) -> None:
        self.emptied = 0
        super().__init__(
            cuda=SimpleNamespace(is_initialized=lambda: started, empty_cache=self._empty)
        )

    def _empty(self) -> None:
        self.emptied += 1


def loaded(monkeypatch: pytest.MonkeyPatch, started: bool) -> Torch:
    torch = Torch(started)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set and deleted again, so that what a test leaves in it is undone.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def test_a_leases_environment_is_set() -> None:
    env.apply(GRANT)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0"


def test_a_framework_that_has_not_started_cuda_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded(monkeypatch, started=False)
    env.apply(GRANT)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0"


def test_an_environment_that_comes_too_late_is_an_error_and_sets_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded(monkeypatch, started=True)
    with pytest.raises(CudaAlreadyStarted, match="CUDA_VISIBLE_DEVICES cannot take effect"):
        env.apply(GRANT)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_the_same_environment_again_is_never_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    env.apply(GRANT)
    loaded(monkeypatch, started=True)
    env.apply(GRANT)


def test_a_framework_that_is_not_loaded_is_not_loaded_by_asking() -> None:
    env.apply(GRANT)
    empty_cache()
    assert "torch" not in sys.modules


def test_a_half_loaded_framework_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    env.apply(GRANT)
    empty_cache()


@pytest.mark.parametrize("started", [True, False])
def test_a_cache_is_emptied_where_cuda_has_started(
    monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    torch = loaded(monkeypatch, started)
    empty_cache()
    assert torch.emptied == started


def test_a_failing_cache_does_not_keep_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = loaded(monkeypatch, started=True)

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.empty_cache = fail
    empty_cache()
