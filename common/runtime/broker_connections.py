"""From settings to the connections that every process of a mesh has: the broker's and the state store's."""

from common.adapters.nats_broker import NatsBroker
from common.adapters.redis_store import RedisStore
from common.runtime.settings import MeshSettings
from common.values.server_access import NatsIdentity, TlsFiles

CONNECT_TIMEOUT_S = 5.0
STORE_TIMEOUT_S = 2.0


async def connect_broker(mesh: MeshSettings, *, name: str) -> NatsBroker:
    """Raises BrokerUnavailable or SettingsError, with words that help and no secret."""
    identity = NatsIdentity(creds_file=mesh.nats_creds_file, nkey_file=mesh.nats_nkey_file)
    urls = _urls(mesh.nats_url)
    return await NatsBroker.connect(urls, name=name, connect_timeout_s=CONNECT_TIMEOUT_S, tls=_tls_files(mesh), identity=identity)


async def connect_store(mesh: MeshSettings, *, timeout_s: float = STORE_TIMEOUT_S) -> RedisStore:
    """Raises StoreUnavailable or SettingsError, with words that help and no secret."""
    return await RedisStore.connect(_urls(mesh.redis_url), timeout_s=timeout_s, tls=_tls_files(mesh))


def _urls(listed: str) -> list[str]:
    return [url for url in (part.strip() for part in listed.split(",")) if url]


def _tls_files(mesh: MeshSettings) -> TlsFiles:
    return TlsFiles(ca=mesh.tls_ca_file, certificate=mesh.tls_cert_file, key=mesh.tls_key_file)
