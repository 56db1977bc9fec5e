"""The `segue` command: help, version, unknown subcommands, the table of settings, and nothing imported too early."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.command import SUBCOMMANDS, main
from tools.doctor import as_json, as_text
from tools.doctor_checks import Finding, check_port
from tools.settings import all_tables

ROOT = Path(__file__).resolve().parents[2]


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SUBCOMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("segue ")


def test_an_unknown_subcommand_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sreve"]) == 2
    assert "sreve" in capsys.readouterr().err


def test_the_command_itself_and_serve_load_no_engine_library() -> None:
    heavy = "('torch', 'transformers', 'httpx', 'nats')"
    program = f"import sys, tools.command, tools.serve, tools.serve_model; print([m for m in {heavy} if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout.strip() == "[]"


def test_the_table_of_settings_has_flag_variable_and_default() -> None:
    tables = all_tables()
    for words in ("`--max-num-seqs`", "`SEGUE_KV_CACHE_MEMORY`", "`enable_prefix_caching`", "127.0.0.1"):
        assert words in tables


def test_findings_as_text_and_json() -> None:
    findings = [
        Finding(name="a", verdict="ok", found="fine", advice="hidden"),
        Finding(name="bb", verdict="fail", found="bad", advice="mend"),
    ]
    text = as_text(findings)
    assert "mend" in text
    assert "hidden" not in text
    assert "1 ok, 0 warn, 1 fail" in text
    shown = json.loads(as_json(findings))
    assert shown["ok"] is False
    assert [row["name"] for row in shown["findings"]] == ["a", "bb"]


def test_a_free_port_is_well_and_a_taken_one_is_not() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert check_port(port).verdict == "warn"
    assert check_port(port).verdict == "ok"
