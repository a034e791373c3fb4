"""What verl needs to run on a machine without GPU: VERL_USE_EXTERNAL_MODULES=cpu_backend,verl_rhythm VERL_PLATFORM=cpu.

verl has no platform, no engine and no rollout server for CPUs. This file registers one of each, by verl's own
registries. The rollout server is rollout.TorchActor (transformers' generate) in an actor of Ray's, in the place of
vLLM's; everything else is verl's. For tests only.
"""

import os
from functools import partial

import cpu_platform  # noqa: F401  isort: skip
import ray
from verl.utils import distributed
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

# ---- The engine ----

# verl asks for "cpu:gloo,cpu:gloo", which torch refuses.
distributed.initialize_global_process_group_ray = partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)
EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)

# ---- The rollout server ----


class CPUReplica(RolloutReplica):
    """Starts a worker's server."""

    async def launch_servers(self):
        from cpu_server import Server  # Ray imports its file by itself, before verl and this one

        name = f"cpu_server_{self.replica_rank}"
        remote = ray.remote(num_cpus=0)(Server)
        server = remote.options(name=name, max_concurrency=1000).remote(
            self.model_config.path, self.config.response_length
        )
        await server.wake_up.remote()  # until it is there
        self.servers, self._server_handle, self._server_address = [server], server, name


class CPURollout(base.BaseRollout):
    """In a worker: sends it its weights."""

    async def update_weights(self, weights, global_steps=0, **kwargs):
        tensors = {name: tensor.detach().clone() for name, tensor in weights}
        await ray.get_actor(f"cpu_server_{os.environ['RANK']}").load.remote(tensors, global_steps)

    async def resume(self, tags):
        pass

    async def release(self):
        pass


RolloutReplicaRegistry.register("cpu", lambda: CPUReplica)
base._ROLLOUT_REGISTRY["cpu", "async"] = f"{__name__}.CPURollout"
