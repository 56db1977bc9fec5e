"""A certificate for 127.0.0.1, made for one test by openssl: it signs itself, so it is its own authority."""

import asyncio
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """Paths of PEM files."""

    ca: str
    certificate: str
    key: str


async def make_authority(folder: Path) -> Authority:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=segue-test"]
    await asyncio.to_thread(
        subprocess.run,
        [*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return Authority(ca=str(certificate), certificate=str(certificate), key=str(key))
