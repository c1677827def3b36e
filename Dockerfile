# One verified bundle over HTTP, without torch:
#   docker build -t zoo .
#   docker run --read-only --cap-drop ALL -p 127.0.0.1:8000:8000 -v "$PWD/models/bundles/NAME:/bundle:ro" -e ZOO_TOKEN zoo
# Another patch release of Python: --build-arg PYTHON=...; other machines than this one's: --platform.
ARG PYTHON=3.13.9-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY recipes recipes
COPY benchmarks benchmarks
COPY data data
COPY zoo zoo
RUN python -m venv /opt/zoo && /opt/zoo/bin/python -m pip wheel --no-deps --wheel-dir /wheels .
# The zoo itself comes without its dependencies, which torch is one of; of the wheel's own list only these extras are taken.
RUN /opt/zoo/bin/python -m pip install --no-deps /wheels/zoo-*.whl \
    && /opt/zoo/bin/python -m zoo.deployment.requirements runtime serve dicom > /wheels/requirements.txt \
    && /opt/zoo/bin/python -m pip install --only-binary=:all: -c constraints.txt -r /wheels/requirements.txt \
    && /opt/zoo/bin/python -m zoo serve --help > /wheels/help.txt \
    && /opt/zoo/bin/python -m pip uninstall --yes pip

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="zoo serve" \
      org.opencontainers.image.description="An image classifier's verified bundle over HTTP, with a page; not a medical device."
# Nothing is installed into it any more.
RUN python -m pip uninstall --yes pip \
    && groupadd --system --gid 10001 zoo \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin zoo
COPY --from=build /opt/zoo /opt/zoo
# Nothing is written: neither by Python nor by the server, so that the file system may be read-only.
ENV PATH=/opt/zoo/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ZOO_HOME=/
WORKDIR /
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=3).read()"]
# Without a token (ZOO_TOKEN, or `--token-file /run/secrets/NAME` behind the image's name) it says so and ends.
ENTRYPOINT ["zoo", "serve", "/bundle", "--host", "0.0.0.0", "--port", "8000"]
