"""Every Python that a test starts imports this at its start, as PYTHONPATH leads here."""

import network_guard

network_guard.install()
