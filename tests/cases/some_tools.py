"""Tools that work and tools that fail in every way."""

import asyncio
import os
import time


def area(width: float, height: float = 1.0) -> float:
    """The area of a rectangle.

    Args:
        width: in metres
        height: in metres
    """
    return width * height


async def slow_area(width: float) -> str:
    """The area of a square, after a while.

    Args:
        width: in metres
    """
    await asyncio.sleep(0.001)
    return f"{width * width} m2"


def fault(how: str) -> str:
    """Fails.

    Args:
        how: in which way
    """
    if how == "hang":
        time.sleep(60)
    elif how == "die":
        os._exit(3)
    elif how == "memory":
        return str(len(bytearray(1 << 30)))
    elif how == "exit":
        raise SystemExit("leaving")
    elif how == "pid":
        return str(os.getpid())
    raise ValueError(f"no way {how}")
