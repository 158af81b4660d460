"""Gives memory that is free back to the system, again and again.

glibc keeps blocks that are freed between others that are in use. Answers need buffers of many
sizes: without this, a server under load for half an hour held 700 MB more at its end, all of it
free.
"""

import asyncio
import ctypes

INTERVAL = 60.0  # seconds


def trim() -> bool:
    """Give back what is free. Whether there was any; False with another C library than glibc."""
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False


async def keep_trimming() -> None:
    """Do so every INTERVAL seconds, in a thread: it may take some 0.1 s."""
    while True:
        await asyncio.sleep(INTERVAL)
        await asyncio.to_thread(trim)
