# One image for head, workers and jobs. `docker build --target cpu -t ...` for CPUs; `--target gpu` (the default) brings the
# CUDA libraries that torch of constraints.txt needs; the machine itself needs only a driver for them (580 or newer).
# The CPU image is some 4 GB smaller. Ray, Python and torch are those of constraints.txt, on head and workers alike.
FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# `ray up` and KubeRay start Ray through bash, and `ray up` copies files by rsync.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates openssh-client procps rsync sudo \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray \
    && echo "ray ALL=(root) NOPASSWD: /usr/bin/chown, /usr/bin/mkdir" > /etc/sudoers.d/ray
WORKDIR /home/ray/distributed_rerank
COPY pyproject.toml constraints.txt README.md ./
COPY distributed_rerank ./distributed_rerank
COPY jobs ./jobs
ENV RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1

FROM base AS cpu
# torch's own index has builds without CUDA; every other package comes from where pip is set to look.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch torchvision \
    && pip install --no-cache-dir -c constraints.txt ".[aws,mlflow]"
USER 1000

FROM base AS gpu
RUN pip install --no-cache-dir -c constraints.txt ".[aws,mlflow]"
USER 1000
