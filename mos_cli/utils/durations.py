"""Durations as text."""

import re

UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """The seconds of "90s", "12m" or "1.5h"; raises ValueError if it is none of these, or nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or not (seconds := float(match[1]) * UNITS[match[2]]):
        raise ValueError(f"'{text}' is no time such as 90s, 12m or 1.5h")
    return seconds


def as_clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, "0:12:00"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
