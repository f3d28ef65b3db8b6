"""Connections that do nothing, and others that send a request so slowly that it never ends. Says `ready` once all are open, and
goes on until it is ended.

Usage: python -m bench.idlers PORT IDLE SLOW
"""

import asyncio
import contextlib
import sys

_PAUSE_S = 0.5
_HEAD = b"POST /api/me HTTP/1.1\r\nHost: localhost:%d\r\nAuthorization: Bearer x\r\nContent-Length: 100000\r\n\r\n"


async def main(port: int, idle: int, slow: int) -> None:
    """Open them all, and keep the slow ones going: whoever is told to leave comes back."""
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(idle)]
    tasks = [asyncio.create_task(_dribble(port)) for _ in range(slow)]
    await asyncio.sleep(_PAUSE_S)
    print("ready", flush=True)
    await asyncio.gather(*tasks)
    del opened


async def _dribble(port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_HEAD % port)
            while not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(_PAUSE_S)


asyncio.run(main(*map(int, sys.argv[1:])))
