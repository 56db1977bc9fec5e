"""One service process of a mesh that is meant to die."""

import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import die_with_parent

ROOT = Path(__file__).parents[2]


@dataclass
class Member:
    """`host` and `port` are where it answers HTTP: a worker's status port, or a gateway's own. `failpoints` are those of its next
    start."""

    name: str
    command: list[str]
    host: str
    port: int
    log: Path
    failpoints: str = ""
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    sleeps: bool = False
    """It was seen stopped."""
    _read: int = field(default=0)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        environment = {**os.environ, "SEGUE_FAILPOINTS": self.failpoints}
        if not self.failpoints:
            del environment["SEGUE_FAILPOINTS"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                preexec_fn=die_with_parent,
            )
        self.starts += 1
        self.sleeps = False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def is_stopped(self) -> bool:
        return self.is_running and self._stat(0) == "T"

    @property
    def resident_bytes(self) -> int:
        """Memory in RAM; 0 where it does not run."""
        return int(self._stat(21) or 0) * os.sysconf("SC_PAGE_SIZE")

    def _stat(self, field_number: int) -> str:
        """A field of /proc/PID/stat after the command's name; empty where the process is gone."""
        assert self.process is not None
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[field_number]
        except OSError:
            return ""

    def skip_log(self) -> None:
        """What stands in the log by now is not news."""
        self._read = self.log.stat().st_size

    def has_passed(self, point: str) -> bool:
        """Whether a failpoint's line has come since `skip_log`."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            return any(b" failpoint " in line and f"point={point}".encode() in line for line in log)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]
