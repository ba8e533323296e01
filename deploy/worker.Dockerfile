# A machine of a Ray cluster, or any place where Rampart runs without an installation. Built from the checkout's top:
#   docker build --file deploy/worker.Dockerfile --tag rampart-worker .
FROM python:3.11
WORKDIR /rampart
COPY requirements.txt pyproject.toml README.md ./
COPY src src
COPY configs configs
COPY tuning tuning
RUN pip install --no-cache-dir --requirement requirements.txt \
    && pip install --no-cache-dir --no-deps auto-LiRPA==0.3 \
    && pip install --no-cache-dir --editable .[ray]
# KubeRay starts what it needs by itself; wget is how it asks whether a machine is well.
RUN useradd --create-home ray
USER ray
