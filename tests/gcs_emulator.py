"""A local gs:// for TensorFlow, whose client has its hosts compiled in but honours HTTPS_PROXY and
CURL_CA_BUNDLE.

    python tests/gcs_emulator.py PROXY_PORT EMULATOR_PORT CERT_DIR      # prints "ready"

A CONNECT proxy on 127.0.0.1 terminates TLS for *.googleapis.com with a certificate of its own
(CERT_DIR/ca.pem) and forwards the plain HTTP to gcp-storage-emulator with an empty bucket
`gresearch`. It tests code paths, not permissions.

Faults are set while it runs, by writing CERT_DIR/faults.json (`Bucket.set_faults` does): a list of
rules, of which each request takes the first that matches and is not used up. A rule has a `mode`

    status      answers with the HTTP status `code`: 503, 429, 403, 401, 404 …
    drop        closes the connection without an answer
    cut         closes it after `after` bytes of the body
    stall       keeps it open and sends nothing after `after` bytes of the body
    alter       flips the bits of byte `after` of the body
    slow        waits `seconds`, then answers as usual

and, where they matter: `match`, a regular expression for "METHOD /path?query" (default: all),
`times`, the requests that it meets (default: all), and `of`, "response" (default) or "request": the
body that cut and alter mean. A request that is cut never reaches the bucket. Writing the file again
starts the counts anew; [] ends all faults. CERT_DIR/requests.log has a line for each request:
"MODE METHOD /path?query", with mode "ok" where no rule applied.
"""
import datetime
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress

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


class Faults:
    """The rules of faults.json, and how often each was applied since the file was written."""

    def __init__(self, folder):
        self.path, self.log = f"{folder}/faults.json", f"{folder}/requests.log"
        self.version, self.rules, self.used = None, [], []
        self.lock = threading.Lock()
        open(self.log, "w").close()

    def pick(self, request_line):
        """The rule for a request, {} for none."""
        with self.lock:
            self._reload()
            rule = next((self._use(i) for i, rule in enumerate(self.rules)
                         if re.search(rule.get("match", ""), request_line)
                         and self.used[i] < rule.get("times", 1 << 60)), {})
            with open(self.log, "a") as log:
                log.write(f"{rule.get('mode', 'ok')} {request_line}\n")
        return rule

    def _use(self, i):
        self.used[i] += 1
        return self.rules[i]

    def _reload(self):
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            return
        version = stat.st_mtime_ns, stat.st_ino
        if version != self.version:
            with open(self.path) as file:
                self.rules = json.load(file)
            self.version, self.used = version, [0] * len(self.rules)


class Bucket:
    """For tests: an emulator in a process of its own, and Python scripts that see it as gs://.

        with Bucket(folder) as bucket:
            bucket.set_faults({"mode": "status", "code": 503, "times": 2})
            out, err = bucket.run("import droid …", *args)"""

    def __init__(self, folder):
        self.folder, ports = folder, []
        os.makedirs(folder, exist_ok=True)
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as free:
                ports.append(str(free.getsockname()[1]))
        self.set_faults()
        self.process = subprocess.Popen([sys.executable, __file__, *ports, str(folder)], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout.readline() == "ready\n"
        self.env = os.environ | {
            "NO_GCE_CHECK": "true", "HTTPS_PROXY": f"http://127.0.0.1:{ports[0]}",
            "PYTHONPATH": "tests:.", "CURL_CA_BUNDLE": f"{folder}/ca.pem",
            "GCS_RETRY_CONFIG_MAX_RETRIES": "1"}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def set_faults(self, *rules):
        # Renamed, so that no half of it is read.
        with open(f"{self.folder}/faults.json.tmp", "w") as file:
            json.dump(rules, file)
        os.replace(f"{self.folder}/faults.json.tmp", f"{self.folder}/faults.json")

    def requests(self):
        """Lines of requests.log, which are removed from it."""
        with open(f"{self.folder}/requests.log", "r+") as file:
            lines = file.read().splitlines()
            file.truncate(0)
        return lines

    def run(self, script, *args, expect=0):
        """A Python script -> what it wrote to stdout and stderr."""
        command = [sys.executable, "-c", script, *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, env=self.env, timeout=300)
        assert result.returncode == expect, result.stderr[-2000:]
        return result.stdout, result.stderr


class Damage:
    """cut, stall or alter: called with each piece of a message, from its body on or its head."""

    def __init__(self, rule, sink, in_body=False):
        self.mode, self.left, self.sink = rule["mode"], rule.get("after", 0), sink
        self.head = None if in_body else b""

    def __call__(self, data):
        """-> what is passed on. Raises OSError where the connection ends."""
        if self.head is None:
            return self._body(data)
        self.head += data
        head, end, body = self.head.partition(b"\r\n\r\n")
        if not end:
            return b""
        self.head = None
        self.sink.sendall(head + end)
        return self._body(body)

    def _body(self, data):
        if len(data) <= self.left:
            self.left -= len(data)
            return data
        good, rest = data[:self.left], data[self.left:]
        if self.mode == "alter":
            self.left = 1 << 60
            return good + bytes([rest[0] ^ 0xFF]) + rest[1:]
        self.sink.sendall(good)
        if self.mode == "stall":
            wait_for_close(self.sink)
        raise OSError("cut by a test")


def wait_for_close(connection, seconds=None):
    connection.settimeout(seconds)
    with suppress(OSError):
        while connection.recv(1 << 16):
            pass


def close(connection):
    with suppress(OSError):                         # already closed
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def serve(client, tls, port, faults):
    read_head(client, 4096)
    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    try:
        client = tls.wrap_socket(client, server_side=True)
    except OSError:                                 # the client has given up
        return
    # One request a connection: the emulator speaks HTTP/1.0.
    head, _, body = read_head(client, 1 << 16).partition(b"\r\n\r\n")
    if head:
        answer(client, head, body, faults.pick(head.split(b" HTTP/")[0].decode()), port)
    close(client)


def answer(client, head, body, rule, port):
    """Answers one request, of whose body some may have been read."""
    mode, of_request = rule.get("mode"), rule.get("of") == "request"
    if mode == "slow":
        time.sleep(rule["seconds"])
    if mode == "status":
        text = json.dumps({"error": {"code": rule["code"], "message": "set by a test"}}).encode()
        client.sendall(b"HTTP/1.1 %d Fault\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                       % (rule["code"], len(text), text))
        # Closing while the client still sends would take the answer away from it.
        return wait_for_close(client, seconds=5)
    if mode == "drop" or mode == "stall" and "after" not in rule:
        return wait_for_close(client) if mode == "stall" else None
    if b"expect: 100-continue" in head.lower():
        # The emulator does not, and curl would wait a second before it sends the body.
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if mode == "cut" and of_request:
        # The emulator would store a request that is cut; Google does not.
        while len(body) < rule.get("after", 0) and (more := client.recv(1 << 16)):
            body += more
        return None
    emulator = socket.create_connection(("127.0.0.1", port))
    damage = Damage(rule, client, in_body=of_request) if mode in ("cut", "alter", "stall") else None
    request, response = (damage, None) if of_request else (None, damage)
    emulator.sendall(head + b"\r\n\r\n" + (request(body) if request and body else body))
    threading.Thread(target=copy_bytes, args=(client, emulator, request), daemon=True).start()
    return copy_bytes(emulator, client, response)


def copy_bytes(source, sink, damage=None):
    """Copies bytes until either side closes."""
    with suppress(OSError):                         # the other side has closed the connection
        while data := source.recv(1 << 16):
            sink.sendall(damage(data) if damage else data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


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

    # Where uploads go on: through the proxy again, so that faults meet their bytes too.
    server.Request.full_url = property(
        lambda request: f"https://{HOSTS[0]}{request._path}")
    server.Request.data = property(data_or_empty)
    server._read_raw_data = read_chunked
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="gresearch").start()


def main(proxy_port, emulator_port, folder):
    make_certificate(folder)
    start_emulator(int(emulator_port))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(f"{folder}/ca.pem", f"{folder}/key.pem")
    faults = Faults(folder)
    proxy = socket.create_server(("127.0.0.1", int(proxy_port)))
    print("ready", flush=True)
    while True:
        client, _ = proxy.accept()
        args = client, tls, int(emulator_port), faults
        threading.Thread(target=serve, args=args, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
