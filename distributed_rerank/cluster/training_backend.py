"""What Ray Train's controller knows of our workers, in a module that imports no torch.

The controller computes nothing. With Ray's own TorchConfig it would import torch first, seconds before any worker
starts. So our workers form their process group themselves (`training.join_workers`).
"""

from ray.train.backend import Backend, BackendConfig


class OwnProcessGroup(Backend):
    """A backend whose workers do everything themselves."""

    share_cuda_visible_devices = True  # NCCL talks directly to GPUs of the same node that it can see


class OwnProcessGroupConfig(BackendConfig):
    """Ray's settings of `OwnProcessGroup`: none."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend's class."""
        return OwnProcessGroup
