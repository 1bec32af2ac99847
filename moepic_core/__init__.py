"""MoEpic core: run a Mixture-of-Experts checkpoint under a device-memory budget.

Importing this package does nothing; `moepic_core.engine.Engine` is the way in, `docs/ARCHITECTURE.md` the map.
"""

__version__ = "0.1.0"
