"""The one way in which clients here speak TLS: the server's certificate and name are always checked."""

import ssl

from common.values.errors import SettingsError
from common.values.server_access import TlsFiles


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Raises SettingsError, naming the file, where one cannot be used."""
    try:
        context = ssl.create_default_context(cafile=files.ca)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"tls_ca_file {files.ca}: cannot be used ({_reason(error)})") from None
    if files.certificate is not None:
        try:
            context.load_cert_chain(files.certificate, files.key)
        except (OSError, ssl.SSLError) as error:
            shown = f"tls_cert_file {files.certificate} with tls_key_file {files.key or files.certificate}"
            raise SettingsError(f"{shown}: cannot be used ({_reason(error)})") from None
    elif files.key is not None:
        raise SettingsError("tls_key_file is of no use without tls_cert_file")
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error) or type(error).__name__
