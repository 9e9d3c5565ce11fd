"""Hugging Face hub: a check whether it can be reached, in seconds instead of minutes of retries."""

import logging
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from urllib.parse import urlsplit
from urllib.request import getproxies

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds


def check_hub() -> None:
    """Work from the local cache if the hub cannot be reached; called before the first request to it.

    The hub's own client would retry for up to a minute. If a proxy is set, only the proxy can decide.
    """
    if os.environ.get("HF_HUB_OFFLINE") or getproxies():
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    pool = ThreadPoolExecutor(1)
    try:
        address = pool.submit(socket.getaddrinfo, host.hostname, host.port or 443).result(_PATIENCE)[0][4]
        socket.create_connection(address[:2], _PATIENCE).close()
    except (OSError, TooLong):
        log.warning("%s cannot be reached: only what is in the local cache can be used", host.hostname)
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when they are imported
        for name in {"huggingface_hub.constants", "datasets.config"} & sys.modules.keys():
            sys.modules[name].HF_HUB_OFFLINE = True
    finally:
        pool.shutdown(wait=False)  # a name server that does not answer is not waited for
