# ProstateVQ in a container, for a CPU or, with NVIDIA's container toolkit, a GPU:
#
#     docker build -t prostatevq .                                       # CPU
#     docker build -t prostatevq:cuda --build-arg TORCH=cu130 .          # GPU: driver 580 or later
#     docker run --rm -v "$PWD/runs:/app/runs" -v "$PWD/images:/app/images" prostatevq train.py --preset demo
#     docker run --rm --gpus all --shm-size 1g -v "$PWD/runs:/app/runs" -v /path/to/slices:/data:ro \
#         prostatevq:cuda train.py --data /data --run runs/hipmri
FROM python:3.12-slim

# Which build of PyTorch: a folder of https://download.pytorch.org/whl.
ARG TORCH=cpu

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/$TORCH" "$(grep '^torch==' requirements.txt)" \
    && pip install --no-cache-dir -r requirements.txt
COPY . .

# Decoded slices; mount a folder here to keep them.
ENV PROSTATEVQ_CACHE=/cache

ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
