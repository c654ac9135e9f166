"""How many cases are generated for a test, and how."""

from hypothesis import HealthCheck, settings


def many(cases: int) -> settings:
    """Settings of hypothesis; the same cases in every run, but for thousands."""
    return settings(
        max_examples=cases,
        derandomize=cases < 1_000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
