"""Moves bytes toward the device; the only place that names streams, events and threads. The contract: `base.py`."""
