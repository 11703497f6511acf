"""Room for a job on a cluster that grows on request: asked for, waited for, held while the job runs, given back.

The request stands only while it is waited for: afterwards an actor without CPUs on each node keeps Ray from ending it
as idle. So nothing is left behind when the job ends, even by SIGKILL, and Ray Data's coordinator, which overwrites
requests with its own, takes nothing away.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.autoscaler.sdk import request_resources
from ray.core.generated import autoscaler_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.errors import BadInput, Outage

logger = logging.getLogger(__name__)

WAIT_S = 900.0
_LOOK_S = 1.0
_ASK_AGAIN_S = 10.0
"""Another job's coordinator may have overwritten the request."""
_TELL_S = 30.0
Resources = Mapping[str, float]


@contextmanager
def room(config: ClusterConfig) -> Iterator[None]:
    """Within the block the cluster has the resources of the workers, if it can grow to them, and keeps its nodes.

    A cluster of a fixed size is used as it is. Raises BadInput where the cluster can never hold the workers, Outage
    where the nodes do not come within `wait_s`.
    """
    if not _has_autoscaler():
        yield
        return
    choices = wanted_bundles(config, ray.cluster_resources())
    if choices:
        _wait_for(choices, WAIT_S if config.wait_s is None else config.wait_s)
    keepers = _keep_nodes()
    try:
        yield
    finally:
        for keeper in keepers:
            ray.kill(keeper)


def wanted_bundles(config: ClusterConfig, present: Resources) -> list[list[dict[str, float]]]:
    """The resources to ask for, one bundle a worker; the second choice where the first can never be had; [] for none.

    Without `num_workers` that is one worker, and only where none fits: what its node brings is then used whole. The
    first choice is GPUs, unless the config says otherwise; a GPU node leaves one more CPU for decoding.
    """
    n_workers = config.num_workers or 1
    with_gpu = {"CPU": config.cpus_per_worker + 1.0, "GPU": 1.0}
    kinds = [
        kind
        for kind, is_gpu in ((with_gpu, True), ({"CPU": float(config.cpus_per_worker)}, False))
        if config.use_gpu in (None, is_gpu)
    ]
    if any(_holds(present, kind, n_workers) for kind in kinds):
        return []
    return [[kind] * n_workers for kind in kinds]


def _wait_for(choices: list[list[dict[str, float]]], seconds: float) -> None:
    """Ask for the first choice that the cluster can grow to, and wait for it."""
    for wanted in choices:
        need = ", ".join(f"{amount * len(wanted):.0f} {name}s" for name, amount in wanted[0].items())
        logger.info("waiting up to %.0f s for the cluster to start nodes with %s", seconds, need)
        try:
            if _is_started(wanted, need, seconds):
                return
        finally:
            request_resources(bundles=[])
        logger.info("this cluster cannot grow to %s", need)
    raise BadInput(
        f"{len(choices[-1])} workers need {need}, which this cluster cannot grow to; lower num_workers or "
        "cpus_per_worker, or raise max_workers of the cluster"
    )


def _is_started(wanted: list[dict[str, float]], need: str, seconds: float) -> bool:
    """True once the nodes are there, False as soon as the autoscaler says that they can never be.

    Raises Outage after `seconds`.
    """
    request_resources(bundles=wanted)
    began = asked = told = time.monotonic()
    while not _holds(ray.cluster_resources(), wanted[0], len(wanted)):
        now = time.monotonic()
        if now - began > _LOOK_S and _is_infeasible(wanted):
            return False
        if now - began > seconds:
            have = ray.cluster_resources()
            found = ", ".join(f"{have.get(name, 0):.0f} {name}s" for name in wanted[0])
            raise Outage(
                f"{need} were asked for and {found} are there after {seconds:.0f} s; see `ray status` for the reason, "
                "raise wait_s, or start the same command later"
            )
        if now - asked > _ASK_AGAIN_S:
            request_resources(bundles=wanted)
            asked = now
        if now - told > _TELL_S:
            logger.info("still waiting for %s, %.0f s by now", need, now - began)
            told = now
        time.sleep(_LOOK_S)
    return True


def _holds(present: Resources, bundle: Resources, n_workers: int) -> bool:
    return all(present.get(name, 0) >= n_workers * amount for name, amount in bundle.items())


def _state() -> Any:
    """What the autoscaler last reported; its version is 0 where there is none."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue]
    reply.ParseFromString(client.get_cluster_status())
    return reply.autoscaling_state


def _has_autoscaler() -> bool:
    return _state().autoscaler_state_version > 0


def _is_infeasible(wanted: list[dict[str, float]]) -> bool:
    """Whether the autoscaler has said that it can never start nodes for this request."""
    refused = (
        request
        for constraint in _state().infeasible_cluster_resource_constraints
        for request in constraint.resource_requests
    )
    return any(dict(one.request.resources_bundle) == wanted[0] and one.count == len(wanted) for one in refused)


class _Keeper:
    """Holds a thousandth of its node's own resource, so that the node is not idle."""

    def is_here(self) -> bool:
        return True


def _keep_nodes() -> list[Any]:
    """A keeper on each node that has CPUs."""
    keepers = []
    for node in ray.nodes():
        name = next((name for name in node["Resources"] if name.startswith("node:") and "internal" not in name), None)
        if not node["Alive"] or not node["Resources"].get("CPU") or name is None:
            continue
        where: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        keeper: Any = ray.remote(num_cpus=0, resources={name: 0.001}, scheduling_strategy=where)(_Keeper)
        keepers.append(keeper.remote())
    ray.get([keeper.is_here.remote() for keeper in keepers])
    return keepers
