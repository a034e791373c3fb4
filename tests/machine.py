"""What this machine can be held to: on a CPU the tests are in float32, on a GPU sampler and trainer are in bfloat16."""

import torch

GPUS = torch.cuda.device_count()
GAP = 0.3 if GPUS else 1e-3  # between the sampler's log-probs and the trainer's
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""} if GPUS == 1 else {}  # for two ranks: one GPU is none
