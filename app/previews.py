"""What a checkpoint would need here and what it would bring, before it is loaded and while it is. Loads nothing.

The state asks it with what it knows of the loaded model. Everything comes from headers, from what this machine has free
and from what was measured earlier; only forecasts take time, and those come later (see `forecasts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moepic_core.budgets import Needs, budget_bytes
from moepic_core.calibrate import probe
from moepic_core.checkpoint import read_spec
from moepic_core.costs import Costs
from moepic_core.drift import Drift, forecast_error
from moepic_core.errors import OutOfRoom
from moepic_core.folders import user_folder
from moepic_core.links import parse_link
from moepic_core.memory import Memory
from moepic_core.needs import needs_of
from moepic_core.routing import RoutingTrace
from moepic_core.spec import MachineProfile, ModelSpec, Plan, Settings
from moepic_core.steering import Steering, costs_key
from moepic_core.units import format_bytes
from moepic_core.verdict import judge

from . import checkpoints
from .forecasts import Forecasts
from .nouns import Forecast, Loaded, Preview

NEED_A_LOAD = ("checkpoint", "device", "link", "dtype", "context_length")  # settings that only a load can change


@dataclass(frozen=True)
class Held:
    """The loaded model, and what would be free again without it."""

    loaded: Loaded
    plan: Plan
    steering: Steering
    num_tokens: int  # that were decoded in this session
    device_bytes: int
    host_bytes: int


class Previews:
    def __init__(self, changed: Callable[[], None]) -> None:
        """`changed` is called when a preview would say more than before."""
        self._forecasts = Forecasts(changed)

    def close(self) -> None:
        self._forecasts.close()

    def of(self, settings: Settings, held: Held | None, reserved_bytes: int) -> Preview:
        """What `settings` would need here. Raises a MoepicError when they cannot work at all."""
        machine = probe(settings.device)
        if held is not None:
            machine = without(machine, held)
            if is_same_model(settings, held.loaded.settings):
                return self._of_loaded(machine, held, reserved_bytes)
        preview = Preview(settings, machine, parse_link(settings.link, machine.device), reserved_bytes=reserved_bytes)
        if held is not None and settings.checkpoint == held.loaded.settings.checkpoint:
            folder: Path | None = Path(held.loaded.spec.path)
            preview = dataclasses.replace(preview, reloads=True)
        else:
            folder = checkpoints.folder(settings.checkpoint)
        if folder is None:
            return dataclasses.replace(preview, missing=checkpoints.missing(settings.checkpoint))
        spec = read_spec(folder, settings.dtype)
        needs = needs_of(settings, spec, machine)
        verdict = judge(spec, needs, less(machine, reserved_bytes), settings.link)
        preview = dataclasses.replace(preview, spec=spec, needs=needs, verdict=verdict)
        if verdict.step == "will not run":
            return preview
        memory = Memory(user_folder())
        costs = memory.costs(costs_key(spec, machine, preview.link.label))
        return dataclasses.replace(
            preview,
            budget_bytes=fitted_budget(settings, needs, preview.free_bytes, reserved_bytes),
            forecast=self._forecast(preview, costs, lambda: memory.trace(spec.fingerprint), 0, ()),
        )

    def _of_loaded(self, machine: MachineProfile, held: Held, reserved_bytes: int) -> Preview:
        loaded = held.loaded
        preview = Preview(
            loaded.settings, machine, loaded.link, loaded.spec, loaded.needs,
            judge(loaded.spec, loaded.needs, less(machine, reserved_bytes), loaded.settings.link),
            held.plan.memory.budget, loaded=True, notes=loaded.notes, reserved_bytes=reserved_bytes, in_force=held.plan,
        )  # fmt: skip
        steering = held.steering
        known = held.num_tokens + (0 if steering.earlier is None else steering.earlier.num_tokens)
        forecast = self._forecast(preview, steering.costs, steering.trace, known, steering.drifts)
        return dataclasses.replace(preview, forecast=forecast)

    def _forecast(
        self,
        preview: Preview,
        costs: Costs | None,
        trace: Callable[[], RoutingTrace | None],
        num_tokens: int,
        drifts: Sequence[Drift],
    ) -> Forecast | None:
        """Made anew when twice as many tokens are known; its error is that of the last replies."""
        if costs is None:
            return None
        spec, needs = preview.spec, preview.needs
        assert spec is not None and needs is not None
        # As KV memory is estimated before loading and measured after it, so are the budgets.
        settings = preview.settings.replace(vram="auto")
        key = (spec.fingerprint, preview.link.label, settings, preview.loaded)
        age = (costs, num_tokens.bit_length())
        largest = preview.machine.device_total_bytes
        forecast = self._forecasts.get(key, age, settings, needs, costs, trace, largest)
        return forecast and dataclasses.replace(forecast, error=forecast_error(costs, drifts))


def is_same_model(one: Settings, other: Settings) -> bool:
    """Whether changing from `one` to `other` needs no loading."""
    return all(getattr(one, name) == getattr(other, name) for name in NEED_A_LOAD)


def badge(spec: ModelSpec, machine: MachineProfile, link: str) -> str:
    """The step of the verdict on a checkpoint over `link`, for the picker."""
    return judge(spec, needs_of(Settings(spec.path), spec, machine), machine, link).step


def fitted_budget(settings: Settings, needs: Needs, free_bytes: int, reserved_bytes: int) -> int:
    """The budget that `settings` ask for, made smaller where other programs shall have a part of the memory.

    Raises OutOfRoom when nothing runs with it.
    """
    if not reserved_bytes:
        return budget_bytes(settings.vram, needs, free_bytes)
    if free_bytes < needs.smallest:
        raise OutOfRoom(
            f"with {format_bytes(reserved_bytes)} reserved for other programs {format_bytes(free_bytes)} is left, and "
            f"the smallest budget is {format_bytes(needs.smallest)}; reserve less"
        )
    return min(free_bytes, budget_bytes(settings.vram, needs, free_bytes))


def less(machine: MachineProfile, reserved_bytes: int) -> MachineProfile:
    """`machine` as far as other programs leave it."""
    host = reserved_bytes if machine.device == "cpu" else 0
    return dataclasses.replace(
        machine,
        device_free_bytes=max(0, machine.device_free_bytes - reserved_bytes),
        host_free_bytes=max(0, machine.host_free_bytes - host),
    )


def without(machine: MachineProfile, held: Held) -> MachineProfile:
    """`machine` as it would be if the loaded model were gone: what it holds is added, up to what was free before it."""
    device, host, before = held.device_bytes, held.host_bytes, held.loaded.machine
    if machine.device == "cpu":
        device = host = device + host
    return dataclasses.replace(
        machine,
        device_free_bytes=max(
            machine.device_free_bytes, min(before.device_free_bytes, machine.device_free_bytes + device)
        ),
        host_free_bytes=max(machine.host_free_bytes, min(before.host_free_bytes, machine.host_free_bytes + host)),
    )
