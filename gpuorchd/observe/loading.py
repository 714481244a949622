"""Import slow modules without holding up the loop.

Some hundred milliseconds of import on the loop would be felt by every client. In a thread the
interpreter changes over every few milliseconds, and it happens once.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
from types import ModuleType


async def load(name: str) -> ModuleType:
    """Import a module in a thread of its own, which has ended when this returns.

    A cancelled caller leaves the thread to end by itself.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[ModuleType] = loop.create_future()

    def settle(module: ModuleType | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        elif module is not None:
            done.set_result(module)

    def work() -> None:
        module = None
        failure = None
        try:
            module = importlib.import_module(name)
        except BaseException as error:
            # Whatever it is belongs to whoever waits for the module, not to this thread.
            failure = error
        try:
            loop.call_soon_threadsafe(settle, module, failure)
        except RuntimeError:
            # The loop has ended: nobody waits any more.
            pass

    thread = threading.Thread(target=work, name=f"load-{name}", daemon=True)
    thread.start()
    try:
        return await done
    finally:
        if done.done() and not done.cancelled():
            thread.join()
