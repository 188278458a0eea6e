"""Settings of every test."""

from hypothesis import HealthCheck, settings

# A busy machine is slow, not wrong: hypothesis neither times examples nor judges how fast they are made.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
