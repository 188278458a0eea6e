"""Memory limits of a process on Metal, as `ado settings` decides them. Elsewhere nothing happens.

Unverified on Metal: no Mac has run this yet. Limits change no result, so they are no input of any stage.
"""

from ado_tasks.backend import mx
from ado_tasks.errors import HardwareError
from ado_tasks.hardware.capability import GIB


def set_limits(wired_gib: float | None, cache_gib: float | None) -> bool:
    """Set MLX's wired limit (memory that macOS may not page out) and its limit on freed buffers that are kept.

    None leaves a limit as it is. Whether there was anything to set: False elsewhere than on Metal.

    Raises:
        HardwareError: more is to be wired down than Metal recommends to use at all.
    """
    if not mx.metal.is_available() or (wired_gib is None and cache_gib is None):
        return False
    if wired_gib is not None:
        most = int(mx.device_info().get("max_recommended_working_set_size", 0))
        if most and wired_gib * GIB > most:
            raise HardwareError(
                f"hardware.wired_limit_gib: {wired_gib}; allowed on this machine: up to {most / GIB:.1f}, what Metal "
                "recommends to use"
            )
        mx.set_wired_limit(int(wired_gib * GIB))
    if cache_gib is not None:
        mx.set_cache_limit(int(cache_gib * GIB))
    return True
