"""Times as people read them. Standard library only: the commands that list runs need no terminal library for it."""


def duration(seconds: float) -> str:
    """Seconds in at most two units: 45s, 3m07s, 2h05m, 4d11h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
