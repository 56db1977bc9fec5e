"""Settings: the order of the sources, refusals that help, and a file that reads back to what was written."""

from pathlib import Path

import pytest

from common.runtime.settings import GatewaySettings, MeshSettings, WorkerSettings
from common.runtime.settings_file import to_file
from common.runtime.settings_parse import parse_gateway_settings, parse_serve_settings, parse_worker_settings
from common.runtime.settings_sources import settings_of
from common.values.errors import SettingsError


def _worker(*argv: str, **environ: str) -> WorkerSettings:
    return parse_worker_settings(argv, environ, default_role="decode")


def test_each_source_beats_the_one_before(tmp_path: Path) -> None:
    config = tmp_path / "segue.toml"
    config.write_text("max_num_seqs = 5\nblock-size = 32\nport = 1234\n[worker]\nmax_num_seqs = 6\n[gateway]\nport = 4321\n")
    assert _worker().max_num_seqs is None
    assert _worker("--config", str(config)).max_num_seqs == 6
    assert _worker("--config", str(config)).block_size == 32
    assert _worker(SEGUE_CONFIG=str(config), SEGUE_MAX_NUM_SEQS="7").max_num_seqs == 7
    assert _worker("--config", str(config), "--max-num-seqs=8", SEGUE_MAX_NUM_SEQS="7").max_num_seqs == 8
    assert parse_gateway_settings(["--config", str(config)], {}).port == 4321


def test_a_yaml_file_reads_like_a_toml_file(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    config = tmp_path / "segue.yaml"
    config.write_text("max_num_seqs: 5\nmesh:\n  log_level: debug\nworker:\n  cores: [0, 1]\n")
    settings = _worker("--config", str(config))
    assert (settings.max_num_seqs, settings.cores, settings.mesh.log_level) == (5, (0, 1), "debug")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--max-nun-seqs", "3"], ["--max-nun-seqs", "--max-num-seqs"]),
        (["--max-num-seqs", "many"], ["max_num_seqs", "whole number", "many"]),
        (["--max-num-seqs"], ["--max-num-seqs", "needs a value"]),
        (["--block-size", "0"], ["block_size", "from 1"]),
        (["--kv-cache-memory", "2 apples"], ["kv_cache_memory", "2GiB"]),
        (["--dtype", "int8"], ["dtype", "bfloat16"]),
        (["--cores", "4-2"], ["cores", "0,2-4"]),
        (["--kv-tiers", "pigeon"], ["kv_tiers", "shm"]),
        (["--worker-id", "a.b"], ["worker_id", "letters"]),
        (["a", "b"], ["one MODEL"]),
        (["-x"], ["-x"]),
        (["--config", "/nowhere/segue.toml"], ["/nowhere/segue.toml"]),
    ],
)
def test_a_bad_flag_is_named_with_what_it_takes(argv: list[str], named: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        _worker(*argv)
    for word in named:
        assert word in str(refused.value)


def test_unknown_variables_and_keys_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="SEGUE_MAX_NUM_SEQS"):
        _worker(SEGUE_MAX_NUM_SEQ="3")
    config = tmp_path / "bad.toml"
    for text, nearest in [("max_num_seq = 3", "max_num_seqs"), ("[worke]\n", "worker"), ("[worker]\nporte = 3", "control_port")]:
        config.write_text(text)
        with pytest.raises(SettingsError) as refused:
            _worker("--config", str(config))
        assert "unknown" in str(refused.value)
        if nearest != "control_port":
            assert nearest in str(refused.value)


def test_variables_of_other_services_and_of_kubernetes_are_left_alone() -> None:
    environ = {
        "SEGUE_PORT": "9",
        "SEGUE_NOTIFY_FD": "3",
        "SEGUE_CONTROL_PORT": "tcp://10.0.0.1:80",
        "SEGUE_NATS_SERVICE_HOST": "10.0.0.1",
    }
    environ |= {"SEGUE_NATS_PORT_4222_TCP_ADDR": "10.0.0.1", "SEGUE_NATS_PORT": "tcp://10.0.0.1:4222"}
    assert _worker(**environ).control_port == 0


def test_sizes_switches_and_lists() -> None:
    settings = _worker(
        "--kv-cache-memory", "1.5GiB", "--no-enable-prefix-caching", "--strict-kernels", "--cores", "3", "--cores", "0-1"
    )
    assert settings.kv_cache_bytes == 3 << 29
    assert settings.prefix_caching is False
    assert settings.strict_kernels is True
    assert settings.cores == (0, 1, 3)
    assert _worker("--kv-cache-memory", "auto").kv_cache_bytes is None
    assert _worker("--kv-cache-memory", "2GB").kv_cache_bytes == 2_000_000_000


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str) -> None:
    assert parse_gateway_settings(["--host", host], {}).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org"])
def test_any_other_address_needs_a_key_or_insecure(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="api-key"):
        parse_gateway_settings(["--host", host], {})
    with pytest.raises(SettingsError, match="api-key"):
        parse_serve_settings(["--host", host], {})
    assert parse_gateway_settings(["--host", host, "--insecure"], {}).insecure
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst\n\nsecond\n")
    assert parse_gateway_settings(["--host", host, "--api-key-file", str(keys), "--api-key", "zero"], {}).api_keys == (
        "zero",
        "first",
        "second",
    )


def test_secrets_show_in_no_repr_and_no_error() -> None:
    settings = parse_gateway_settings(["--api-key", "hush-hush", "--nats-url", "nats://u:hush-hush@h"], {})
    assert "hush-hush" not in repr(settings)
    with pytest.raises(SettingsError) as refused:
        parse_gateway_settings(["--nats-url", "hush-hush\0"], {})
    assert "hush-hush" not in str(refused.value)


def test_a_written_file_reads_back_to_equal_settings(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    mesh = MeshSettings(nats_url='nats://a:"b\\\n\x7fü@c', redis_url="redis://x")
    worker = WorkerSettings(
        mesh=mesh, worker_id="w-1", role="prefill", model="./Ω model", cores=(0, 2), prefix_caching=False, synthetic_step_s=0.25
    )
    to_file(path, mesh, worker)
    assert path.stat().st_mode & 0o777 == 0o600
    assert parse_worker_settings(["--config", str(path)], {}, default_role="both") == worker
    gateway = GatewaySettings(mesh=mesh, gateway_id="g-1", api_keys=("a,b", "c"), listen_fd=7)
    to_file(path, mesh, gateway)
    assert parse_gateway_settings(["--config", str(path)], {}) == gateway


def test_the_synthetic_kv_of_a_token_is_whole_words() -> None:
    assert parse_worker_settings(["--synthetic-kv-token-bytes", "32"], {}, default_role="both").synthetic_kv_token_bytes == 32
    with pytest.raises(SettingsError, match="multiple of 16"):
        parse_worker_settings(["--synthetic-kv-token-bytes", "24"], {}, default_role="both")


@pytest.mark.parametrize(
    ("argv", "counts"),
    [
        ([], (1, 1, 0)),
        (["--both", "2"], (0, 0, 2)),
        (["--decode", "3"], (1, 3, 0)),
        (["--both", "1", "--decode", "1"], (1, 1, 1)),
        (["--prefill", "0", "--decode", "0", "--both", "1"], (0, 0, 1)),
    ],
)
def test_worker_counts(argv: list[str], counts: tuple[int, int, int]) -> None:
    assert parse_serve_settings(argv, {}).worker_counts == counts


def test_serve_without_any_worker_is_refused() -> None:
    with pytest.raises(SettingsError, match="at least one worker"):
        parse_serve_settings(["--prefill", "0", "--decode", "0"], {})


def test_serve_passes_settings_on_and_keeps_hosts_apart() -> None:
    settings = parse_serve_settings(["m", "--port", "0", "--max-num-seqs", "4", "--log-level", "debug", "--nats-url", "nats://h"], {})
    assert (settings.worker.model, settings.worker.max_num_seqs, settings.worker.mesh.log_level) == ("m", 4, "debug")
    assert (settings.gateway.port, settings.worker.host, settings.nats_url, settings.redis_url) == (0, "127.0.0.1", "nats://h", None)
    with pytest.raises(SettingsError, match="role"):
        parse_serve_settings(["--role", "both"], {})


def test_every_setting_says_what_it_means_and_its_default_is_of_its_kind() -> None:
    for group in (MeshSettings, GatewaySettings, WorkerSettings):
        for item in settings_of(group):
            assert item.means
            if item.default is not None:
                assert item.kind.read(item.default) == item.default
