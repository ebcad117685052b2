"""A local gs:// for TensorFlow, whose client has its hosts compiled in but honours HTTPS_PROXY and
CURL_CA_BUNDLE.

    python tests/gcs_emulator.py PROXY_PORT EMULATOR_PORT CERT_DIR      # prints "ready"

A CONNECT proxy on 127.0.0.1 terminates TLS for *.googleapis.com with a certificate of its own
(CERT_DIR/ca.pem) and forwards the plain HTTP to gcp-storage-emulator with an empty bucket
`gresearch`. It tests code paths, not permissions.
"""
import datetime
import os
import re
import socket
import ssl
import sys
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


HOSTS = ["www.googleapis.com", "storage.googleapis.com"]


def make_certificate(folder):
    os.makedirs(folder, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "local gs://")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS])
    authority = x509.BasicConstraints(ca=True, path_length=None)
    builder = (x509.CertificateBuilder()
               .subject_name(name)
               .issuer_name(name)
               .public_key(key.public_key())
               .serial_number(x509.random_serial_number())
               .not_valid_before(now - datetime.timedelta(days=1))
               .not_valid_after(now + datetime.timedelta(days=2))
               .add_extension(hosts, critical=False)
               .add_extension(authority, critical=True))
    certificate = builder.sign(key, hashes.SHA256())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                serialization.NoEncryption())
    with open(f"{folder}/key.pem", "wb") as file:
        file.write(private)
    with open(f"{folder}/ca.pem", "wb") as file:
        file.write(certificate.public_bytes(serialization.Encoding.PEM))


def read_head(source, size):
    """Bytes up to the end of the HTTP header, with what was received after it."""
    head = b""
    while b"\r\n\r\n" not in head:
        # Nothing is received once the other side has closed: that ends the header too.
        head += source.recv(size) or b"\r\n\r\n"
    return head


def copy_bytes(source, sink, host=None):
    """Copies bytes until either side closes.

    host: replaces the first Host header, from which the emulator makes its upload addresses."""
    try:
        if host:
            head = read_head(source, 1 << 16)
            sink.sendall(re.sub(rb"(?i)\r\nhost: [^\r]*", b"\r\nHost: " + host, head, count=1))
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass                                        # the other side has closed the connection
    finally:
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass                                # already closed


def serve(client, tls, port):
    read_head(client, 4096)
    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    secure = tls.wrap_socket(client, server_side=True)
    emulator = socket.create_connection(("127.0.0.1", port))
    args = secure, emulator, b"127.0.0.1:%d" % port
    threading.Thread(target=copy_bytes, args=args, daemon=True).start()
    copy_bytes(emulator, secure)


def start_emulator(port):
    """gcp-storage-emulator with an empty bucket, in a thread; two of its faults are corrected."""
    from gcp_storage_emulator import server
    data, read_raw_data = server.Request.data, server._read_raw_data

    # TensorFlow posts empty bodies: None in the emulator, which expects bytes.
    def data_or_empty(request):
        found = data.fget(request)
        return b"" if found is None and request.method == "POST" else found

    # libcurl sends a length with chunked bodies; RFC 9112, 6.3: the chunks count then.
    def read_chunked(handler):
        if (handler.headers.get("Transfer-Encoding") or "").lower() == "chunked":
            del handler.headers["Content-Length"]
        return read_raw_data(handler)

    server.Request.data = property(data_or_empty)
    server._read_raw_data = read_chunked
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="gresearch").start()


def main(proxy_port, emulator_port, folder):
    make_certificate(folder)
    start_emulator(int(emulator_port))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(f"{folder}/ca.pem", f"{folder}/key.pem")
    proxy = socket.create_server(("127.0.0.1", int(proxy_port)))
    print("ready", flush=True)
    while True:
        client, _ = proxy.accept()
        args = client, tls, int(emulator_port)
        threading.Thread(target=serve, args=args, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
