"""`--host auto`: the address towards NATS, found without sending anything."""

import socket

import pytest

from common.runtime.own_address import address_towards
from common.runtime.settings_parse import parse_worker_settings
from common.values.errors import SettingsError


@pytest.mark.parametrize("urls", ["nats://127.0.0.1:4222", "127.0.0.1", "tls://ada:s3cret@localhost:1,nats://no.such.invalid:4222"])
def test_a_server_on_this_machine_is_reached_from_loopback(urls: str) -> None:
    assert address_towards(urls) == "127.0.0.1"


def test_the_address_towards_elsewhere_is_one_of_our_own() -> None:
    """192.0.2.1 stands for any host elsewhere; no packet goes there."""
    try:
        address = address_towards("nats://192.0.2.1:4222")
    except SettingsError:
        pytest.skip("this machine has no route to elsewhere")
    assert address != "0.0.0.0"
    with socket.socket() as listening:
        listening.bind((address, 0))


def test_an_unknown_server_is_named_without_its_password() -> None:
    with pytest.raises(SettingsError) as refused:
        address_towards("nats://ada:s3cret@no.such.invalid:4222")
    assert "no.such.invalid" in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_a_worker_takes_the_address_towards_its_own_nats() -> None:
    environ = {"SEGUE_NATS_URL": "nats://127.0.0.1:1", "SEGUE_HOST": "auto"}
    assert parse_worker_settings([], environ, default_role="decode").host == "127.0.0.1"
    assert parse_worker_settings(["--host", "10.9.8.7"], environ, default_role="decode").host == "10.9.8.7"
