# ProstateVQ in a container, for the CPU or, with NVIDIA's container toolkit, for GPUs (driver 580 or later):
#
#     docker build -t prostatevq .
#     docker build -t prostatevq:cuda --build-arg DEVICE=cuda .
#
#     mkdir -p runs images
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/runs:/app/runs" -v "$PWD/images:/app/images" \
#         prostatevq train.py --preset demo --run runs/demo
#
# On GPUs: `--gpus all --shm-size 1g`. Mount slices with `-v /path/to/slices:/data:ro` and add `--data /data`. Several
# GPUs: `-m torch.distributed.run --nproc-per-node 4 -- train.py ...` in place of `train.py ...`.
FROM python:3.12-slim

ARG DEVICE=cpu

WORKDIR /app
COPY requirements.txt .
# PyPI has the CUDA build of PyTorch, pytorch.org the CPU build, which is a tenth as large.
RUN if [ "$DEVICE" = cpu ]; then \
        pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.txt)"; \
    fi && pip install --no-cache-dir -r requirements.txt
COPY . .

# Decoded slices are kept here: mount a folder to keep them longer than the container.
RUN mkdir -m 1777 /cache
ENV PROSTATEVQ_CACHE=/cache MPLCONFIGDIR=/tmp

ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
