"""A local gs:// for TensorFlow, whose client has its hosts compiled in but honours HTTPS_PROXY and CURL_CA_BUNDLE.

    python tests/gcs_emulator.py PROXY_PORT EMULATOR_PORT CERT_DIR      # prints "ready"

A CONNECT proxy on 127.0.0.1 ends TLS for *.googleapis.com with a certificate of its own (CERT_DIR/ca.pem) and hands
the plain HTTP to gcp-storage-emulator with an empty bucket `gresearch`. It proves code paths, not permissions."""
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
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
                   .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
                   .not_valid_after(now + datetime.timedelta(days=2))
                   .add_extension(x509.SubjectAlternativeName([x509.DNSName(h) for h in HOSTS]), False)
                   .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256()))
    with open(f"{folder}/key.pem", "wb") as file:
        file.write(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                     serialization.NoEncryption()))
    with open(f"{folder}/ca.pem", "wb") as file:
        file.write(certificate.public_bytes(serialization.Encoding.PEM))


def pump(source, sink, host=None):
    """Copies bytes until either side closes. host: rewrites the first Host header, from which the emulator makes
    its upload addresses."""
    try:
        if host:
            head = b""
            while b"\r\n\r\n" not in head:
                head += source.recv(1 << 16) or b"\r\n\r\n"
            sink.sendall(re.sub(rb"(?i)\r\nhost: [^\r]*", b"\r\nHost: " + host, head, count=1))
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass                                        # the other side has closed: the connection is over
    finally:
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass                                # already closed


def serve(client, tls, port):
    head = b""
    while b"\r\n\r\n" not in head:
        head += client.recv(4096) or b"\r\n\r\n"
    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    secure = tls.wrap_socket(client, server_side=True)
    emulator = socket.create_connection(("127.0.0.1", port))
    threading.Thread(target=pump, args=(secure, emulator, b"127.0.0.1:%d" % port), daemon=True).start()
    pump(emulator, secure)


def start_emulator(port):
    from gcp_storage_emulator import server
    data = server.Request.data                      # TensorFlow posts empty bodies, which the emulator trips over
    server.Request.data = property(
        lambda self: data.fget(self) if data.fget(self) is not None or self.method != "POST" else b"")
    read = server._read_raw_data

    def read_chunked(handler):                      # libcurl sends both; chunked must win
        if (handler.headers.get("Transfer-Encoding") or "").lower() == "chunked":
            del handler.headers["Content-Length"]
        return read(handler)
    server._read_raw_data = read_chunked
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="gresearch").start()


def main(proxy_port, emulator_port, folder):
    make_certificate(folder)
    start_emulator(int(emulator_port))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(f"{folder}/ca.pem", f"{folder}/key.pem")
    server = socket.create_server(("127.0.0.1", int(proxy_port)))
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=(server.accept()[0], tls, int(emulator_port)), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
