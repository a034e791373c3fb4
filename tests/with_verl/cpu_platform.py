"""A platform for verl on CPUs. It must be registered before verl's engines are imported: see cpu_backend.py."""

from contextlib import contextmanager

import torch
from verl.plugin.platform import PlatformRegistry
from verl.plugin.platform.platform_base import PlatformBase


class CPUModule:
    """torch.cpu, with the functions that torch.cuda has more: they do nothing and return 0."""

    def mem_get_info(self, device=None) -> tuple[int, int]:
        return 0, 0

    def get_device_name(self, device=None) -> str:
        return "CPU"

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name, lambda *args, **kwargs: 0)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name, vendor_name = "cpu", "cpu"

    @property
    def device_module(self):
        return CPUModule()

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"  # Ray is told to have as many as there are workers

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None
