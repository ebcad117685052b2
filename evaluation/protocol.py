"""Published protocols: what their settings are, and whether a measurement keeps to them."""
from dataclasses import replace


# The protocol of jepa-wms (arXiv:2512.24497, appendix): what a key is there, unless it is given.
JEPA_WMS = dict(context=2, horizon=3, steps=3, objective="l2", planners=("cem_jepa_wms",),
                pairs=64, per_episode=1)


def with_protocol(cfg):
    """The Config with what energy.protocol stands for, where nothing else was asked for."""
    if not cfg.energy.protocol:
        return cfg
    given = cfg.given or {}
    values = {key: value for key, value in JEPA_WMS.items() if f"energy.{key}" not in given}
    return replace(cfg, energy=replace(cfg.energy, **values))


def protocol_name(e):
    """The name of the protocol, and what was changed of it: such numbers are not comparable."""
    if not e.protocol:
        return ""
    changed = [f"{key} {_plain(getattr(e, key))}" for key, value in JEPA_WMS.items()
               if key not in ("pairs", "per_episode") and getattr(e, key) != value]
    return f"{e.protocol} but with {', '.join(changed)}" if changed else e.protocol


def _plain(value):
    return " and ".join(value) or "none" if isinstance(value, tuple) else value


def plan_horizons(cfg):
    """How many clip frames ahead the planners look: of a published protocol that one alone."""
    e = cfg.energy
    return [e.horizon] if e.protocol else list(range(1, e.horizon + 1))
