# counterstain in a container (docs/containers.md).
#   docker build -t counterstain .
#   docker build -t counterstain:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
#   docker run --rm -v "$PWD:/work" counterstain demo
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG EXTRAS=""
# An index with smaller, CPU-only wheels of torch may be named; nothing is needed.
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN if ! command -v python3; then \
        apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -m venv /opt/counterstain
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
# Gradio (extra app) asks for an older pillow than the one that is pinned.
RUN case ",${EXTRAS}," in *,app,*) sed -i '/^pillow==/d' constraints.txt ;; esac \
    && /opt/counterstain/bin/pip install --constraint constraints.txt ".${EXTRAS:+[${EXTRAS}]}"

FROM ${BASE}
ENV DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN if ! command -v python3; then \
        apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /opt/counterstain /opt/counterstain
# Weights and timings are kept in the home folder; anybody may write there, so --user works as well.
RUN useradd --create-home --uid 10001 counterstain && chmod 1777 /home/counterstain
ENV PATH=/opt/counterstain/bin:$PATH HOME=/home/counterstain
USER 10001
WORKDIR /work
ENTRYPOINT ["counterstain"]
CMD ["--help"]
