"""The hub that cannot be reached is found out in seconds, and only where the hub is needed."""

import os
import socket

import datasets.config
import huggingface_hub.constants
import pytest

from lib.models import load as hub

LIBRARIES = (huggingface_hub.constants, datasets.config)


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    for library in LIBRARIES:  # which are imported already
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "_HUB_PATIENCE", 0.2)


def went_offline() -> bool:
    places = {os.environ["HF_HUB_OFFLINE"] == "1", *(library.HF_HUB_OFFLINE for library in LIBRARIES)}
    assert len(places) == 1, "everywhere or nowhere"
    return places.pop()


def no_name(*_):
    raise socket.gaierror(-2, "Name or service not known")


def test_a_hub_out_of_reach_is_said_to_be(online, monkeypatch, caplog):
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    hub.check_hub()
    assert went_offline() and "huggingface.co cannot be reached" in caplog.text


def test_a_mirror_is_asked_in_the_hubs_place_and_within_reach_is_left_alone(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.check_hub()
        server.accept()[0].close()  # it was asked
    assert not went_offline()


@pytest.mark.parametrize("how", ["offline", "proxy"])
def test_nothing_is_tried_offline_or_behind_a_proxy(how, online, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("it looks up the hub"))
    if how == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    hub.check_hub()
