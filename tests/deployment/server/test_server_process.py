from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from live_server import answer_in, heard, serve_command, status_from
from test_server_http import dicom, huge_png

from zoo.cli import main
from zoo.deployment.server.gate import Token
from zoo.deployment.server.process import bind, listen
from zoo.errors import ZooError

pytestmark = pytest.mark.slow  # processes and servers of their own

TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Return `command(words...)`: exit code, standard output and standard error of `zoo serve` that does not start."""

    if "ZOO_HOME" not in os.environ:
        monkeypatch.setenv("ZOO_HOME", str(tmp_path))

    def run(*words):
        monkeypatch.setattr("sys.argv", ["zoo", "serve", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


def ask_in_threads(server, data, count):
    """Ask from as many threads; return the threads and the list that their answers come into."""
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(server.predict(data))) for _ in range(count)]
    for each in threads:
        each.start()
    return threads, answers


def request(data):
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: "
    return f"{head}{len(data)}\r\n\r\n".encode() + data


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def queued(server):
    text = server.ask("GET", "/metrics")[2]
    return float(next(line for line in text.splitlines() if line.startswith("zoo_queue_images ")).split()[1])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_is_in_flight_and_takes_nothing_new(odd, picture, how):
    server = odd(seconds_an_image=0.5, limits={"batch_images": 1})
    threads, answers = ask_in_threads(server, picture(), 4)
    until(lambda: queued(server) == 4)
    server.process.send_signal(how)
    until(lambda: server.ask("GET", "/ready")[0] == 503)
    status, headers, _ = server.predict(picture())
    assert status == 503 and int(headers["retry-after"]) >= 1
    assert server.ask("GET", "/health")[0] == 200
    for each in threads:
        each.join()
    assert [status for status, _, _ in answers] == [200] * 4
    assert server.stop() == 0


def test_a_body_that_is_still_coming_is_answered_before_the_end(odd, picture):
    server, data = odd(limits={"last_body_s": 20}), picture()  # slow machines send slowly
    with server.connect() as sock:
        sock.sendall(request(data)[: -len(data)] + data[:100])
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/ready")[0] == 503)
        sock.sendall(data[100:])
        assert status_from(sock) == 200
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("limits", "whole"), [({"last_body_s": 1, "grace_s": 60}, 1), ({"last_body_s": 600, "grace_s": 2}, 0)]
)
def test_bodies_that_do_not_come_whole_neither_hold_up_the_end_nor_make_it_a_failure(odd, picture, limits, whole):
    server, data = odd(seconds_an_image=2, limits={"silent_s": 600, "body_s": 600, **limits}), picture()
    silent = [server.connect() for _ in range(4)]
    for each in silent:
        each.sendall(request(data)[:-1])
    threads, answers = ask_in_threads(server, data, whole)
    until(lambda: queued(server) == whole)
    time.sleep(0.3)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    heard_last = [heard(each) for each in silent]
    assert all(each.startswith(b"HTTP/1.1 503 ") and b"retry-after: 5\r\n" in each.lower() for each in heard_last)
    for each in threads:
        each.join()
    assert [status for status, _, _ in answers] == [200] * whole
    assert server.process.wait(60) == 0
    assert time.monotonic() - started < 50
    for each in silent:
        each.close()


def test_idle_connections_do_not_hold_up_the_end(odd):
    server = odd(limits={"header_s": 600, "idle_s": 600, "grace_s": 60})
    sockets = [server.connect() for _ in range(5)]
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 30
    for each in sockets:
        assert each.recv(1) == b""
        each.close()


def test_what_takes_longer_than_the_grace_ends_with_an_error(odd, picture):
    server = odd(seconds_an_image=4, limits={"batch_images": 1, "grace_s": 1})
    threads, _answers = ask_in_threads(server, picture(), 1)
    until(lambda: queued(server) == 1)
    assert server.stop() == 1  # as many as stayed unanswered, here
    for each in threads:
        each.join()


def test_a_second_signal_waits_for_nobody(odd, picture):
    server = odd(seconds_an_image=60, limits={"batch_images": 1})
    threads, _answers = ask_in_threads(server, picture(), 1)
    until(lambda: queued(server) == 1)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    assert time.monotonic() - started < 40
    for each in threads:
        each.join()


def test_a_full_queue_sends_away_at_once(odd, picture):
    server = odd(seconds_an_image=5, limits={"batch_images": 1, "queue_images": 2})
    threads, answers = ask_in_threads(server, picture(), 2)
    until(lambda: queued(server) == 2)
    status, headers, found = server.predict(picture())
    assert (status, found["error"]) == (503, "busy; try again")
    assert int(headers["retry-after"]) >= 1 and not answers  # it did not wait for them
    for each in threads:
        each.join()
    assert [status for status, _, _ in answers] == [200, 200]


def test_a_request_that_waits_too_long_is_told_so_and_its_place_comes_free(odd, picture):
    server = odd(seconds_an_image=1.5, limits={"batch_images": 1, "queue_images": 4, "deadline_s": 0.5})
    status, headers, found = server.predict(picture())
    assert (status, found["error"]) == (503, "busy: no answer in time; try again")
    assert int(headers["retry-after"]) >= 1
    until(lambda: queued(server) == 0)


def test_a_client_that_left_is_not_computed_for(odd, picture):
    server, data = odd(seconds_an_image=0.5, limits={"batch_images": 1, "queue_images": 20}), picture()
    sockets = [server.connect() for _ in range(12)]
    for each in sockets:
        each.sendall(request(data))
    until(lambda: queued(server) >= 10)
    for each in sockets:
        each.close()
    assert server.predict(data)[0] == 200
    lines = server.ask("GET", "/metrics")[2].splitlines()
    assert float(next(each for each in lines if each.startswith("zoo_batch_images_sum")).split()[1]) < 10


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_client_that_only_ends_its_side_is_answered(odd, picture, version):
    server, data = odd(seconds_an_image=1.2), picture()
    with server.connect() as sock:
        sock.sendall(request(data).replace(b"HTTP/1.1", b"HTTP/" + version))
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))  # until the server closes
    status, head = answer_in(answer)
    assert (status, answer[:17], answer.count(b"HTTP/1.1")) == (200, b"HTTP/1.1 200 OK\r\n", 1)
    assert json.loads(answer[len(head) + 4 :])["predictions"][0]["error"] is None


def test_all_that_was_asked_for_before_a_client_ended_its_side_is_answered(odd, picture):
    server, data = odd(seconds_an_image=0.5), picture()
    with server.connect() as sock:
        sock.sendall(request(data) + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + request(data))
        sock.shutdown(socket.SHUT_WR)
        answers = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answers.startswith(b"HTTP/1.1 200 OK\r\n")
    assert (answers.count(b"HTTP/1.1 200 OK\r\n"), answers.count(b"HTTP/1.1 ")) == (3, 3)
    assert (answers.count(b'"predictions"'), answers.count(b'"alive"')) == (2, 1)
    with server.connect() as sock:
        sock.sendall(request(data)[:-1])
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""  # what is not whole never will be


def test_images_of_several_requests_are_computed_together(odd, picture):
    server = odd(seconds_an_image=0.3)
    threads, answers = ask_in_threads(server, picture(), 9)
    for each in threads:
        each.join()
    assert [status for status, _, _ in answers] == [200] * 9
    lines = server.ask("GET", "/metrics")[2].splitlines()
    batches = float(next(each for each in lines if each.startswith("zoo_batch_images_count")).split()[1])
    assert batches < 9


def test_a_fault_of_the_network_is_a_500_without_its_words(odd, picture):
    server = odd(fails=True)
    status, _, found = server.predict(picture())
    assert (status, found["error"]) == (500, "something in this server is broken; its log says where")
    assert "broken: ValueError at" in server.log
    assert "PATIENT" not in server.log and "Traceback" not in server.log
    assert server.ask("GET", "/health")[0] == 200


# What it costs, and what it leaves behind ------------------------------------------------------------------------


def test_an_image_of_a_gigapixel_is_refused_before_it_is_decoded(start, bundle_folder, picture):
    server = start(str(bundle_folder))
    data = huge_png(32000)
    assert len(data) < 1 << 20
    server.predict(picture())
    before, seconds = server.peak_mib(), []
    for _ in range(5):  # the best of five: others may work on this machine too
        started = time.monotonic()
        status, _, found = server.predict(data, "image/png")
        seconds.append(time.monotonic() - started)
        assert (status, found["error"]) == (413, "too large: 32000 x 32000 pixels, more than 50000000")
    assert min(seconds) < 1
    assert server.peak_mib() - before < 100


def test_the_server_needs_no_torch(bundle_folder, tmp_path):
    code = (
        "import sys; from zoo.deployment.server import app, process; "
        "from zoo.deployment.server.served import load_models; from zoo.files import home; "
        f"load_models({{'m': {str(bundle_folder)!r}}}, home(), None); "
        "print([each for each in ('torch', 'timm', 'albumentations', 'sklearn', 'pandas') if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_nothing_of_what_is_sent_is_written_down(start, bundle_folder, tmp_path, picture):
    empty = tmp_path / "tmp"
    empty.mkdir()
    server = start(str(bundle_folder), env={"TMPDIR": str(empty), "HOME": str(empty), "XDG_CACHE_HOME": str(empty)})
    opened = Path(f"/proc/{server.process.pid}/fd")
    seen = set()
    big = picture("BMP", size=(1200, 1200))  # 4 MB: what spools would spill
    for _ in range(3):
        assert server.predict_form([big, picture()], name="SECRET-NAME.png", query="?explain=true")[0] == 200
        assert server.predict(dicom(), "application/dicom")[0] == 200
        server.predict(dicom(PatientName="SECRET^" + "x" * 50, Rows=0), "application/dicom")
        server.predict(dicom()[:-900], "application/dicom", query="?model=SECRET-MODEL")
        server.ask("GET", "/SECRET-PATH?SECRET-QUERY")
        seen |= {os.path.realpath(each) for each in opened.iterdir()}
    assert not list(empty.rglob("*"))
    assert not [each for each in seen if each.startswith(("/tmp", "/dev/shm")) and not each.endswith("log.txt")]
    assert server.stop() == 0
    assert "POST /predict 200" in server.log
    assert "SECRET" not in server.log
    assert "1.2.3" not in server.log and "127.0.0.1" not in server.log


def test_answers_hold_no_name_of_a_file_and_no_value_of_a_header(live, picture):
    found = live.predict_form([picture(), dicom(), dicom(Rows=0), dicom()[:-900]], name="SECRET-NAME.png")
    assert found[0] == 200 and len(found[2]["predictions"]) == 4
    assert "SECRET" not in json.dumps(found)


# Tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_opens_the_models_and_is_never_logged(start, bundle_folder, tmp_path, picture):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    server = start(str(bundle_folder), "--token-file", str(file), "--host", "0.0.0.0")
    for path in ("/", "/health", "/ready"):
        assert server.ask("GET", path)[0] == 200
    wrong = ["", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer  "]
    for given in wrong:
        headers = {"Authorization": given} if given else {}
        for method, path in (("GET", "/model"), ("GET", "/models"), ("GET", "/metrics"), ("GET", "/openapi.json")):
            status, found, text = server.ask(method, path, headers=headers)
            assert (status, found["www-authenticate"]) == (401, 'Bearer realm="zoo"')
        status, _, text = server.ask("POST", "/predict", picture(), {"Content-Type": "image/png", **headers})
        assert status == 401 and TOKEN not in json.dumps(text)
    right = {"Authorization": f"bearer {TOKEN}"}
    assert server.ask("GET", "/model", headers=right)[0] == 200
    assert server.ask("POST", "/predict", picture(), {"Content-Type": "image/png", **right})[0] == 200
    schema = server.ask("GET", "/openapi.json", headers=right)[2]
    assert schema["paths"]["/predict"]["post"]["security"] == [{"token": []}]
    # reached by any address, but not by any name
    assert server.ask("GET", "/model", headers={**right, "Host": "192.0.2.7:8000"})[0] == 200
    assert server.ask("GET", "/model", headers={**right, "Host": "evil.example"})[0] == 421
    assert server.stop() == 0
    assert TOKEN not in server.log


def test_a_token_of_the_environment_does_not_stay_there(start, bundle_folder):
    server = start(str(bundle_folder), "--allowed-host", "zoo.example", env={"ZOO_TOKEN": TOKEN})
    assert server.ask("GET", "/model")[0] == 401
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "zoo.example"}
    assert server.ask("GET", "/model", headers=headers)[0] == 200


def test_the_time_of_a_token_check_does_not_depend_on_what_is_right(monkeypatch):
    import hmac

    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    token = Token(TOKEN)
    assert token.admits(f"Bearer {TOKEN}".encode())
    assert not token.admits(b"Bearer x") and not token.admits(None) and not token.admits(b"Basic " + TOKEN.encode())
    assert len(compared) == 4 and {(len(a), len(b)) for a, b in compared} == {(32, 32)}
    assert TOKEN not in repr(token) + str(vars(token))


@pytest.mark.parametrize("text", ["", "short", "x" * 513, "with space in it 0123456789", "ümläute-0123456789"])
def test_a_weak_token_is_refused(text):
    with pytest.raises(ZooError, match=r"the token must have 16 to 512 printable ASCII characters without spaces"):
        Token(text)


# What does not start ----------------------------------------------------------------------------------------------


def test_another_address_needs_a_token(command, bundle_folder, monkeypatch):
    monkeypatch.delenv("ZOO_TOKEN", raising=False)
    code, out, err = command(bundle_folder, "--host", "0.0.0.0", "--port", "0")
    assert (code, out) == (1, "")
    assert err == (
        "error: --host 0.0.0.0 can be reached from other machines, and there is no token; "
        "give one with --token-file FILE or ZOO_TOKEN\n"
    )


def test_a_port_that_is_taken_and_a_host_that_is_none_are_said_in_a_line(command, bundle_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = command(bundle_folder, "--port", port)
    assert (code, err) == (
        1,
        f"error: cannot listen at 127.0.0.1 port {port}: Address already in use; --port 0 takes a free one\n",
    )
    code, _, err = command(bundle_folder, "--host", "no host")
    assert (code, err) == (1, "error: --host 'no host' is no address; take 127.0.0.1, or one of this machine's\n")
    code, _, err = command(bundle_folder, "--host", "192.0.2.7")
    assert code == 1 and err.startswith("error: cannot listen at 192.0.2.7 port 8000: ") and err.count("\n") == 1


def test_a_bound_port_cannot_be_reached_before_it_listens_and_one_that_was_taken_meanwhile_is_said():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=60)
        with bind("127.0.0.1", port) as second:
            listen(first)
            socket.create_connection(("127.0.0.1", port), timeout=60).close()
            with pytest.raises(ZooError, match=f"^cannot listen at 127.0.0.1 port {port}: Address already in use; --p"):
                listen(second)


def test_a_host_name_that_never_matches_is_said_before_a_model_is_loaded(command, bundle_folder):
    code, _, err = command(bundle_folder, "--port", "0", "--allowed-host", "*")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: --allowed-host must be one name or address, as zoo.example") and "'*'" in err


def test_a_run_is_no_bundle(trained, command):
    run = next(each.name for each in trained.runs.iterdir())
    code, _, err = command(run, "--port", "0")
    assert code == 1
    assert err == (f"error: {run!r} is a run, and what is served is a bundle; make one with: zoo export {run}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a bundle to serve"),
        (["nobody"], "there is no bundle 'nobody'"),
        (["--name", "nobody"], "--name must be NAME=BUNDLE"),
        (["--name", "a b=nobody"], "--name must be NAME=BUNDLE"),
        (
            ["--token-file", "/nowhere/at all"],
            "--token-file '/nowhere/at all' cannot be read: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(command, words, said):
    code, out, err = command(*words)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {said}") and err.count("\n") == 1


def test_two_of_a_name_and_a_damaged_bundle_are_refused(command, bundle_folder, tmp_path):
    code, _, err = command("--name", f"a={bundle_folder}", "--name", f"a={bundle_folder}")
    assert code == 1 and err.startswith("error: two bundles have the name 'a'")
    import shutil

    copy = shutil.copytree(bundle_folder, tmp_path / "copy")
    data = bytearray((copy / "model.onnx").read_bytes())
    data[-1] ^= 1
    (copy / "model.onnx").write_bytes(data)
    code, _, err = command(copy, "--port", "0")
    assert code == 1 and "model.onnx was changed" in err and err.count("\n") == 1


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart", "prometheus_client"])
def test_a_missing_extra_is_named_with_its_install_line(command, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = command("x")
    name = package.replace("_", "-")
    assert (code, err) == (1, f"error: {name} is not installed; install it with: pip install 'zoo[serve]'\n")


def test_it_says_where_it_listens(bundle_folder, tmp_path):
    words = [each for each in serve_command(str(bundle_folder)) if each != "--json"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"serving {bundle_folder.name} at http://127.0.0.1:".encode())
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize("json_line", [True, False])
def test_it_serves_on_where_nobody_reads_what_it_says(bundle_folder, tmp_path, json_line):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    words = [sys.executable, "-m", "zoo", "serve", str(bundle_folder), "--port", str(port)]
    ours, theirs = os.pipe()
    os.close(ours)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*words, *(["--json"] if json_line else [])], stdout=theirs, stderr=log)
    os.close(theirs)

    def answers():
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except ConnectionError:
            return False
        finally:
            connection.close()

    try:
        until(answers, 60)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines and not [line for line in lines if "GET /health 200" not in line]


def test_the_document_names_every_flag_route_and_number(live):
    from typer.testing import CliRunner

    from zoo.cli import app

    text = (Path(__file__).parents[3] / "docs" / "deployment.md").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    flags = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help", "--home"}
    assert len(flags) >= 9
    assert not [flag for flag in flags if f"`{flag}" not in text]
    numbers = set(re.findall(r"^# HELP (\w+)", live.ask("GET", "/metrics")[2], re.M))
    assert len(numbers) >= 10
    assert not [name for name in numbers if f"`{name}" not in text]
    assert not [path for path in live.ask("GET", "/openapi.json")[2]["paths"] if path not in text]
