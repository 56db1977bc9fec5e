"""A fresh name for each start of a process."""

import secrets

from common.values.ids import Incarnation


def make_incarnation() -> Incarnation:
    return Incarnation(secrets.token_hex(8))
