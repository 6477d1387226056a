"""XManager's Kubernetes executor, completed for TPU slices of GKE.

XManager 0.8.5 accepts TPU requirements, but leaves them out of the Job that it makes: there is no
`google.com/tpu`, no node selector, and only one pod. The missing parts are filled in when the Job
is sent to the cluster, as GKE's documentation says: an indexed Job with a pod for each host, in the
headless service that XManager makes, so that GKE tells every pod who the others are. The pods'
account, requests and volumes are those of tpu_setup/jobset.yaml, which explains them.
"""

import dataclasses
import json
import math
from typing import Any

from kubernetes import client as k8s
from kubernetes.config import ConfigException
from xmanager import xm, xm_local
from xmanager.cloud import kubernetes
from xmanager.xm import job_operators
from xmanager.xm_local import registry

from apr_jax.errors import UsageError, UserError
from apr_jax.plan.chips import CHIPS

ENVIRONMENT = {
    "JAX_COORDINATOR_ADDRESS": "auto",
    "APR_CACHE": "/cache/xla",
    "APR_COPIES": "/cache/copies",
}
TPU = "google.com/tpu"
# From SIGTERM to the end of a pod: time for the current step or rollout, and for a save.
_GRACE_SECONDS = 120
_PORTS = (8471, 8482)  # The ports of libtpu and of JAX's coordinator.
_JOB = "batch.kubernetes.io/job-name"  # Label of a pod.
_NODE_POOL = "cloud.google.com/gke-nodepool"  # Label of a node.
_REQUESTS = {"cpu": "8", "memory": "32Gi", "ephemeral-storage": "32Gi"}
# Path -> name and medium of a volume.
_VOLUMES = {
    "/cache": ("cache", None),
    "/dev/shm": ("shared-memory", "Memory"),
}
# GKE's name of the chip, and the most chips of a slice that is one node. Larger slices have nodes
# of 4 chips.
_CHIPS = {
    xm.ResourceType.TPU_V4: ("tpu-v4-podslice", 4),
    xm.ResourceType.TPU_V5E: ("tpu-v5-lite-podslice", 8),
    xm.ResourceType.TPU_V5P: ("tpu-v5p-slice", 4),
    xm.ResourceType.TPU_V6E: ("tpu-v6e-slice", 8),
}
# Slices of v5e and v6e.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Slices of v4 and v5p; larger ones consist of cubes of 4x4x4.
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice as GKE sees it.

    Attributes:
      accelerator, topology: labels of its nodes.
      hosts: number of nodes.
      chips: number of chips of a node.
    """

    accelerator: str
    topology: str
    hosts: int
    chips: int


def slice_of(requirements: xm.JobRequirements) -> Slice:
    """Returns the slice that the requirements name.

    Raises:
      UsageError: they name no TPU, or a slice that GKE does not have.
    """
    kind = requirements.accelerator
    topology = requirements.topology
    if kind not in xm.TpuType:
        raise UsageError(
            f"--executor gke: runs on a TPU slice, not on {kind or 'CPUs'}; give --require"
            " tpu_v5e=2x4"
        )
    flag = f"--require {str(kind).lower()}={topology.name}"
    if kind not in _CHIPS:
        raise UsageError(
            f"{flag}: GKE has no such slices; must be tpu_v4, tpu_v5e, tpu_v5p or tpu_v6e"
        )

    accelerator, largest_node = _CHIPS[kind]
    chips = math.prod(topology.dimensions)
    if largest_node == 8:  # v5e and v6e.
        if topology.name not in _FLAT:
            raise UsageError(f"{flag}: GKE has no such slice; must be {', '.join(_FLAT)}")
    else:  # v4 and v5p.
        most = CHIPS[str(kind).lower().removeprefix("tpu_")].pod
        is_large = _is_of_cubes(topology.dimensions) and chips <= most
        if topology.name not in _SMALL and not is_large:
            raise UsageError(
                f"{flag}: GKE has no such slice; must be {', '.join(_SMALL)}, or AxBxC with A <= B"
                f" <= C, all multiples of 4, of {most} chips at most"
            )
    hosts = 1 if chips <= largest_node else chips // 4
    return Slice(accelerator, topology.name, hosts, chips // hosts)


def _is_of_cubes(dimensions: list[int]) -> bool:
    """Returns whether a slice consists of cubes of 4x4x4, its dimensions in ascending order."""
    multiples = all(size > 0 and size % 4 == 0 for size in dimensions)
    return multiples and len(dimensions) == 3 and dimensions == sorted(dimensions)


class Gke(xm_local.Kubernetes):
    """An `xm_local.Kubernetes` whose TPU requirements reach the cluster.

    Attributes:
      service_account: the pods' account in the cluster; it must be allowed to write to the bucket.
    """

    service_account = "apr"


def complete(job: k8s.V1Job, wanted: Slice, service_account: str) -> None:
    """Fills in what a slice needs and XManager's Job lacks."""
    pod = job.spec.template.spec
    (container,) = pod.containers

    # A pod for each host.
    job.spec.completions = job.spec.parallelism = wanted.hosts
    job.spec.completion_mode = "Indexed"
    # XManager annotates TensorFlow's version, which only TPUs without VMs of their own needed.
    job.spec.template.metadata.annotations = None
    # Kubernetes names the pods by their index, and GKE names the hosts by that.
    pod.hostname = None
    # `service_account` is an old name of `service_account_name`.
    pod.service_account = None
    pod.service_account_name = service_account
    pod.termination_grace_period_seconds = _GRACE_SECONDS

    # The slice that they run on.
    pod.node_selector = {
        "cloud.google.com/gke-tpu-accelerator": wanted.accelerator,
        "cloud.google.com/gke-tpu-topology": wanted.topology,
    }
    if wanted.hosts > 1:
        pod.affinity = _alone_on_a_slice(job.metadata.name)

    # What a pod needs on its host.
    required = {
        name.replace("_", "-"): amount for name, amount in container.resources.limits.items()
    }
    container.resources.requests = _REQUESTS | required
    container.resources.limits = required | {TPU: str(wanted.chips)}
    container.ports = [k8s.V1ContainerPort(container_port=port) for port in _PORTS]
    container.volume_mounts = [
        k8s.V1VolumeMount(name=name, mount_path=path) for path, (name, _) in _VOLUMES.items()
    ]
    pod.volumes = [
        k8s.V1Volume(name=name, empty_dir=k8s.V1EmptyDirVolumeSource(medium=medium))
        for name, medium in _VOLUMES.values()
    ]


def _alone_on_a_slice(job: str) -> k8s.V1Affinity:
    """Puts all pods of a Job on one slice, and keeps pods of other Jobs away from it.

    A slice is a node pool. The rules are those of JobSet's exclusive topology.
    """

    def rule(*expressions: tuple[str, list[str] | None]) -> k8s.V1PodAffinityTerm:
        requirements = [
            k8s.V1LabelSelectorRequirement(key=_JOB, operator=operator, values=jobs)
            for operator, jobs in expressions
        ]
        selector = k8s.V1LabelSelector(match_expressions=requirements)
        return k8s.V1PodAffinityTerm(label_selector=selector, topology_key=_NODE_POOL)

    together = rule(("In", [job]))
    apart = rule(("Exists", None), ("NotIn", [job]))
    return k8s.V1Affinity(
        pod_affinity=k8s.V1PodAffinity(
            required_during_scheduling_ignored_during_execution=[together]
        ),
        pod_anti_affinity=k8s.V1PodAntiAffinity(
            required_during_scheduling_ignored_during_execution=[apart]
        ),
    )


class _Completing(k8s.ApiClient):
    """A client of the cluster that completes the Jobs which it sends."""

    def __init__(self, executor: Gke):
        super().__init__()
        self._wanted = slice_of(executor.requirements)
        self._service_account = executor.service_account

    def sanitize_for_serialization(self, obj: Any) -> Any:
        if isinstance(obj, k8s.V1Job):
            complete(obj, self._wanted, self._service_account)
        return super().sanitize_for_serialization(obj)


class Printing(_Completing):
    """A client that sends nothing and keeps what would be sent.

    It answers like a cluster that has XManager's service already.
    """

    def __init__(self, executor: Gke):
        super().__init__(executor)
        self.sent: list[dict[str, Any]] = []

    def request(self, method: str, url: str, *rest: Any, body: Any = None, **more: Any) -> Any:
        del url, rest, more
        if method == "POST":
            self.sent.append(json.loads(json.dumps(body)))
            return _Answer(body)
        services = {"items": [{"metadata": {"name": "experiments"}, "spec": {}}]}
        return _Answer(services)


class _Answer:
    """A successful answer of a cluster, as the client's HTTP library would return it."""

    status = 200
    reason = "OK"

    def __init__(self, body: Any):
        self.data = json.dumps(body).encode()

    def read(self) -> bytes:
        return self.data

    def getheader(self, name: str, default: str | None = None) -> str | None:
        return "application/json" if name.lower() == "content-type" else default

    def getheaders(self) -> dict[str, str]:
        return {"Content-Type": "application/json"}


async def _launch(unit: Any, group: xm.JobGroup) -> list[kubernetes.KubernetesHandle]:
    """Launches the jobs of a group that run on GKE.

    Raises:
      UserError: there is no cluster, or it refuses a job.
    """
    handles = []
    jobs = job_operators.collect_jobs_by_filter(group, lambda job: isinstance(job.executor, Gke))
    for job in jobs:
        try:
            kubernetes._load_k8s_config()
        except ConfigException as error:
            raise UserError(
                f"no cluster: gcloud container clusters get-credentials CLUSTER ({error})"
            ) from None
        client = kubernetes.Client(_Completing(job.executor))
        try:
            launched = client.launch(unit.get_full_job_name, [job])
            handles.append(kubernetes.KubernetesHandle(jobs=launched))
        except k8s.ApiException as error:
            raise UserError(f"the cluster refused the job: {error.reason}; {error.body}") from None
    return handles


registry.register(Gke, launch=_launch, create_handle=kubernetes._create_handle)


def printed(job: xm.Job) -> dict[str, Any]:
    """Returns the Job that the cluster would get, made by XManager and completed by `complete`."""
    api = Printing(job.executor)
    kubernetes.Client(api).launch(lambda name: f"experiment_1_{name}", [job])
    return api.sent[-1]
