"""uvicorn, but a signal drains it first: health says so while answers end, and the process ends with 0."""

import socket
import threading
import time
from types import FrameType

import uvicorn

from suture.core.errors import UserError
from suture.serve.worker import BROKEN, Worker

EACH = 0.05  # seconds between two looks


class Server(uvicorn.Server):
    """Ends when the worker has broken, too."""

    def __init__(self, application, worker: Worker, drain_seconds: float):
        config = uvicorn.Config(application, log_config=None, access_log=False, lifespan="off", server_header=False,
                                timeout_graceful_shutdown=5, h11_max_incomplete_event_size=1 << 16)  # fmt: skip
        super().__init__(config)
        self.worker, self.drain_seconds = worker, drain_seconds
        self.ends: float | None = None  # by time.monotonic(), once it drains

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.ends is not None:
            self.should_exit = self.force_exit = True
            return
        self.ends = time.monotonic() + self.drain_seconds
        threading.Thread(target=self.worker.drain, daemon=True).start()  # it takes a lock, which the main thread may have

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self.worker.state == BROKEN:
            self.should_exit = True
        if self.ends is not None and (self.worker.idle or time.monotonic() > self.ends):
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError where this machine does not let it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)  # who connects while it starts is answered once it has
    except OSError as error:
        raise UserError(
            f"{host}:{port}", f"cannot be listened at ({error.strerror})", "choose another --host or --port"
        ) from None
    return made
