"""The Dockerfile: linted, held against the rules that matter, and its steps run afresh, without Docker."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from browser import listening

from zoo.deployment.bundle import list_bundles
from zoo.deployment.requirements import requirements_of
from zoo.errors import ZooError
from zoo.files import home

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
# What every Debian has, slim or not, and nothing else of the system may be needed.
SYSTEM = re.compile(r"(ld-linux-.*|lib(c|m|dl|rt|pthread|util|resolv|z|stdc\+\+|gcc_s)|linux-vdso)\.so(\.\d+)*")


def steps() -> list[tuple[str, str]]:
    """Return instruction and argument of every step, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0], re.sub(r"\s+", " ", line.split(None, 1)[1])) for line in lines]


def _of(kind: str) -> list[str]:
    return [argument for instruction, argument in steps() if instruction == kind]


def _final() -> list[tuple[str, str]]:
    start = max(place for place, (kind, _) in enumerate(steps()) if kind == "FROM")
    return steps()[start:]


def test_hadolint_finds_nothing():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert linter is not None, "hadolint is not installed; it comes with the extra `dev`"
    done = subprocess.run([linter, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hadolint_would_find_something(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /tmp && sudo pip install x\n")
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([linter, "--no-color", str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode and "DL3006" in done.stdout


def test_the_image_is_small_pinned_and_runs_as_nobody():
    assert [each.split(" AS ")[0] for each in _of("FROM")] == ["python:${PYTHON}"] * 2
    (version,) = _of("ARG")
    assert re.fullmatch(r"PYTHON=3\.1[1-9]\.\d+-slim-[a-z]+", version)
    final = dict(_final())
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", final["USER"])
    assert final["EXPOSE"] == "8000"
    assert json.loads(final["ENTRYPOINT"])[:5] == ["zoo", "serve", "/bundle", "--host", "0.0.0.0"]
    health = json.loads(final["HEALTHCHECK"].partition("CMD ")[2])
    assert health[0] == "python" and "/health" in health[2]
    compile(health[2], "health", "exec")
    assert "CMD" not in final
    copied = [argument for kind, argument in _final() if kind in ("COPY", "ADD")]
    assert copied == ["--from=build /opt/zoo /opt/zoo"]


def test_no_secret_address_or_torch_is_in_it():
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!127\.0\.0\.1)|index-url|extra-index|trusted-host|find-links", text)
    assert not re.search(r"^(ENV|ARG)\b.*TOKEN", text, re.MULTILINE)
    assert not re.search(r"\b(sudo|curl|wget|ADD|latest)\b", text)


def test_neither_python_of_the_image_has_pip():
    of_build, of_image = " ".join(_of("RUN")[:-1]), dict(_final())["RUN"]
    assert "/opt/zoo/bin/python -m pip uninstall --yes pip" in of_build
    assert re.match(r"python -m pip uninstall --yes pip ", of_image)
    kinds = [kind for kind, _ in _final()]
    assert kinds.index("RUN") < kinds.index("ENV")  # behind which `python` is another one


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_the_server_itself_whatever_proxy_is_set(status):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = json.loads(dict(_final())["HEALTHCHECK"].partition("CMD ")[2])
        script = words[2].replace("127.0.0.1:8000", f"127.0.0.1:{server.server_port}")
        proxies = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": ""}
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **proxies}, capture_output=True, check=False, timeout=60
        )
        server.shutdown()
    assert (done.returncode, asked) == (0 if status == 200 else 1, ["/health"])


def _sent() -> list[str]:
    """Return what the builder is sent: files of the repository that `.dockerignore` lets through."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    files = [name for name in listed if (ROOT / name).is_file()]
    files += ["zoo/__pycache__/x.pyc", "models/bundles/a/model.onnx", ".env", "data/iq_othnccd/images/a.jpg", "token"]

    def is_sent(name: str) -> bool:
        sent = True
        for line in lines:
            pattern = line.removeprefix("!")
            parents = [name, *(str(each) for each in Path(name).parents)][:-1] or [name]
            if pattern.startswith("**/"):
                met = any(fnmatch.fnmatch(Path(each).name, pattern[3:]) for each in parents)
            else:
                depth = pattern.count("/")
                met = any(fnmatch.fnmatch(each, pattern) and each.count("/") == depth for each in parents)
            sent = line[0] == "!" if met else sent
        return sent

    return [name for name in files if is_sent(name)]


def test_the_builder_is_sent_what_the_wheel_needs_and_no_image_model_or_secret():
    sent = _sent()
    if len(sent) < 50:
        pytest.skip("this is no git checkout")
    assert {"pyproject.toml", "constraints.txt", "README.md", "zoo/__init__.py", "recipes/resnet18.toml"} <= set(sent)
    assert not [name for name in sent if re.search(r"^(models|tests|docs|\.)|images/|\.pyc$|token", name)]
    places = "recipes", "benchmarks", "data"
    kinds = {Path(name).suffix for name in sent if name.startswith(places)}
    assert kinds <= {".toml", ".csv", ".md"}


def test_requirements_are_those_of_the_extras_and_a_wrong_one_is_said():
    listed = [
        "torch>=2.9",
        "zoo[runtime]; extra == 'serve'",
        'fastapi>=1; extra == "serve"',
        "numpy>=2; extra == 'runtime'",
    ]
    assert requirements_of(["serve", "runtime"], listed) == ["fastapi>=1", "numpy>=2"]
    with pytest.raises(ZooError, match=r"no extra 'server'; did you mean 'serve'\?; the package has runtime, serve"):
        requirements_of(["server"], listed)
    with pytest.raises(ZooError, match="the package has none"):
        requirements_of(["serve"], [])


def _shell(script: str, folder: Path) -> None:
    """Run a RUN step with the places of the image moved below a folder."""
    for place in ("/opt/zoo", "/wheels", "/src"):
        script = re.sub(rf"(?<![\w./]){place}\b", str(folder) + place, script)
    script = re.sub(r"(?<!\S)python (?=-m venv)", f"{sys.executable} ", script)
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    done = subprocess.run(
        ["sh", "-ec", script], cwd=folder / "src", env=plain, capture_output=True, text=True, check=False, timeout=900
    )
    unreachable = re.search(r"No matching distribution|Could not find a version|Network is unreachable", done.stderr)
    if done.returncode and unreachable and os.environ.get("CI", "").lower() not in ("1", "true"):
        pytest.skip("no package index can be reached from here")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `/opt/zoo` as the image has it, made by the Dockerfile's own steps."""
    folder = tmp_path_factory.mktemp("image")
    for name in _sent():
        if (ROOT / name).is_file():
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "src" / name)
    for kind, argument in steps()[: -len(_final())]:  # the final image's own would change this machine's Python
        if kind == "RUN":
            _shell(argument, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_steps_make_a_server_without_torch(image, _bundled_template, tmp_path):
    python = image / "opt" / "zoo" / "bin" / "python"
    listed = (image / "wheels" / "requirements.txt").read_text().splitlines()
    assert {re.split(r"[<>=]", each)[0] for each in listed} >= {
        "onnxruntime",
        "fastapi",
        "uvicorn",
        "pydicom",
        "pillow",
    }
    assert "Serve bundles over HTTP" in (image / "wheels" / "help.txt").read_text()
    found = subprocess.run(
        [
            python,
            "-c",
            "import importlib.util as u; print([n for n in ('torch', 'timm', 'pip', 'scipy') if u.find_spec(n)])",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert found.stdout.strip() == "[]"
    page = next(image.glob("opt/zoo/lib/python*/site-packages/zoo/deployment/server/page"))
    assert {"index.html", "page.css", "page.js", "markdown.js"} <= {each.name for each in page.iterdir()}

    bundle = tmp_path / "bundle"
    (name,) = list_bundles(home(_bundled_template))
    shutil.copytree(_bundled_template / "models" / "bundles" / name, bundle)
    command = [str(image / "opt" / "zoo" / "bin" / "zoo"), "serve", str(bundle), "--host", "0.0.0.0", "--port", "0"]
    token = {"ZOO_TOKEN": "a-token-of-the-tests-0123456789"}
    clean = {"PATH": os.environ["PATH"], "ZOO_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    refused = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path, check=False, timeout=60)
    assert refused.returncode == 1 and refused.stdout == ""
    assert re.match(r"error: .*there is no token; give one with --token-file FILE or ZOO_TOKEN", refused.stderr)
    before = sorted(tmp_path.rglob("*"))
    with listening([*command, "--json"], {**clean, **token}) as url:
        here = re.sub(r"//[^:]+", "//127.0.0.1", url)
        script = json.loads(dict(_final())["HEALTHCHECK"].partition("CMD ")[2])
        script = [str(python), *script[1:-1], script[-1].replace("http://127.0.0.1:8000", here)]
        assert subprocess.run(script, check=False, timeout=30).returncode == 0
        assert httpx.get(f"{here}/model").status_code == 401
        sent = {"Content-Type": "image/png", "Authorization": f"Bearer {token['ZOO_TOKEN']}"}
        answer = httpx.post(f"{here}/predict", content=(bundle / "sample.png").read_bytes(), headers=sent)
        assert answer.status_code == 200 and len(answer.json()["predictions"][0]["scores"]) == 3
        assert "page.js" in httpx.get(f"{here}/").text
    assert subprocess.run(script, check=False, timeout=30, stderr=subprocess.DEVNULL).returncode == 1
    assert sorted(tmp_path.rglob("*")) == before  # a read-only file system is enough


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_its_libraries_need_no_system_package(image):
    if shutil.which("ldd") is None:
        pytest.skip("no ldd here")
    libraries = [path for path in image.glob("opt/zoo/lib/**/*.so*") if not path.is_symlink()]
    assert len(libraries) > 50
    foreign, own = {}, {path.name for path in libraries}  # those of a wheel find each other when they are loaded
    for path in libraries:
        for line in subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout.splitlines():
            name = Path(line.partition("=>")[0].strip().split(" (")[0]).name
            if not SYSTEM.fullmatch(name) and name not in own and "statically linked" not in line:
                foreign[path.name] = line.strip()
    assert foreign == {}
