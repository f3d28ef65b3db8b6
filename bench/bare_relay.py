"""The peer of P5 and P6: the least a Starlette relay can do, without authentication, metering or checks.

Usage: python -m bench.bare_relay PORT UPSTREAM
"""

import asyncio
import sys

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


async def main(port: int, upstream: str) -> None:
    """Serve until ended."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def relay(request: Request) -> Response:
            answer = await session.post(
                upstream + request.url.path, data=await request.body(), headers={"Content-Type": "application/json"}
            )
            if answer.content_type == "text/event-stream":
                return StreamingResponse(answer.content.iter_any(), answer.status, media_type=answer.content_type)
            return Response(await answer.read(), answer.status, media_type=answer.content_type)

        app = Starlette(routes=[Route("/v1/chat/completions", relay, methods=["POST"])])
        await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, http="httptools", log_level="error")).serve()


asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
