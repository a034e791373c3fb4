import os

# Before verl is imported, which the tests do.
os.environ.update(
    VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="cpu_backend,verl_rhythm", HF_HUB_OFFLINE="1", WANDB_MODE="disabled"
)
