"""Memory limits: set on Metal alone, in bytes, and never above what Metal recommends."""

from pathlib import Path

import pytest

from ado_tasks import __main__ as command_line
from ado_tasks.backend import mx
from ado_tasks.errors import ConfigError, HardwareError
from ado_tasks.fit.limits import set_limits
from ado_tasks.hardware.capability import GIB


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What MLX is asked for, on a Mac of 16 GiB that recommends 12."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * GIB})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: calls.append(("wired", limit)))
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: calls.append(("cache", limit)))
    return calls


def test_on_metal_they_are_set(asked: list[tuple[str, int]]) -> None:
    assert set_limits(8.5, 2.0)
    assert asked == [("wired", int(8.5 * GIB)), ("cache", 2 * GIB)]


def test_none_is_left_alone(asked: list[tuple[str, int]]) -> None:
    assert not set_limits(None, None) and asked == []
    assert set_limits(None, 0.0) and asked == [("cache", 0)]


def test_more_than_metal_recommends_is_refused(asked: list[tuple[str, int]]) -> None:
    with pytest.raises(HardwareError, match=r"hardware\.wired_limit_gib: 13; allowed on this machine: up to 12\.0"):
        set_limits(13, 1.0)
    assert asked == []


def test_elsewhere_nothing_happens(asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert not set_limits(8.5, 2.0) and asked == []


def test_every_task_obeys_the_section_hardware(asked: list[tuple[str, int]], tmp_path: Path) -> None:
    command_line.limit_memory({"hardware": {"target": "auto", "wired_limit_gib": 8.0}, "train": {}})
    command_line.limit_memory({"train": {}})
    assert asked == [("wired", 8 * GIB)]
    with pytest.raises(ConfigError, match=r"hardware\.cache_limit_gib: -1 is not allowed"):
        command_line.limit_memory({"hardware": {"cache_limit_gib": -1}})
