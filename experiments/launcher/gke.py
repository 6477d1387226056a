"""XManager's Kubernetes executor, for TPU slices of GKE.

XManager 0.8.5 takes TPU requirements and leaves them out of the Job that it makes: no
`google.com/tpu`, no node selector, one pod. What is missing is filled in on the Job's way to the
cluster, by GKE's documentation: an indexed Job with a pod for each host, in the headless service
that XManager makes, so that GKE tells every pod who the others are. The pod's account, requests and
volumes are those of tpu_setup/jobset.yaml, which says what they are for."""

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
_GRACE_SECONDS = 120  # From SIGTERM, for the step or rollout under way and a save.
_PORTS = (8471, 8482)  # Of libtpu, and of JAX's coordinator.
# Labels of a pod, of a node.
_JOB, _NODE_POOL = (
    "batch.kubernetes.io/job-name",
    "cloud.google.com/gke-nodepool",
)
_REQUESTS = {"cpu": "8", "memory": "32Gi", "ephemeral-storage": "32Gi"}
# A name, and a medium, for each path.
_VOLUMES = {
    "/cache": ("cache", None),
    "/dev/shm": ("shared-memory", "Memory"),
}
# GKE's name of the chip, and up to how many chips share a node; larger slices have nodes of 4.
_CHIPS = {
    xm.ResourceType.TPU_V4: ("tpu-v4-podslice", 4),
    xm.ResourceType.TPU_V5E: ("tpu-v5-lite-podslice", 8),
    xm.ResourceType.TPU_V5P: ("tpu-v5p-slice", 4),
    xm.ResourceType.TPU_V6E: ("tpu-v6e-slice", 8),
}
# Slices of v5e and v6e; and of v4 and v5p, where larger ones are of cubes of 4x4x4.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice as GKE sees it.

    Attributes:
      accelerator, topology: labels of its nodes.
      hosts: nodes; chips: of one of them.
    """

    accelerator: str
    topology: str
    hosts: int
    chips: int


def slice_of(requirements: xm.JobRequirements) -> Slice:
    """The slice that is asked for.

    Raises:
      UsageError: no TPU, or a slice that GKE does not have.
    """
    kind, topology = requirements.accelerator, requirements.topology
    if kind not in xm.TpuType:
        raise UsageError(
            f"--executor gke: runs on a TPU slice, not on {kind or 'CPUs'}; give --require"
            " tpu_v5e=2x4"
        )
    asked = f"--require {str(kind).lower()}={topology.name}"
    if kind not in _CHIPS:
        raise UsageError(
            f"{asked}: GKE has no such slices; must be tpu_v4, tpu_v5e, tpu_v5p or tpu_v6e"
        )
    accelerator, alone = _CHIPS[kind]
    chips = math.prod(topology.dimensions)
    most = CHIPS[str(kind).lower().removeprefix("tpu_")].pod
    if alone == 8 and topology.name not in _FLAT:
        raise UsageError(f"{asked}: GKE has no such slice; must be {', '.join(_FLAT)}")
    if (
        alone == 4
        and topology.name not in _SMALL
        and not (_is_of_cubes(topology.dimensions) and chips <= most)
    ):
        raise UsageError(
            f"{asked}: GKE has no such slice; must be {', '.join(_SMALL)}, or AxBxC with A <= B <="
            f" C, all multiples of 4, of {most} chips at most"
        )
    hosts = 1 if chips <= alone else chips // 4
    return Slice(accelerator, topology.name, hosts, chips // hosts)


def _is_of_cubes(dimensions: list[int]) -> bool:
    multiples = all(size > 0 and size % 4 == 0 for size in dimensions)
    return multiples and len(dimensions) == 3 and dimensions == sorted(dimensions)


class Gke(xm_local.Kubernetes):
    """`xm_local.Kubernetes` whose TPU requirements reach the cluster.

    Attributes:
      service_account: of the pods, in the cluster; may write to the bucket.
    """

    service_account = "apr"


def complete(job: k8s.V1Job, wanted: Slice, service_account: str) -> None:
    """Fills in what XManager's Job lacks of a slice."""
    pod = job.spec.template.spec
    (container,) = pod.containers
    job.spec.completions = job.spec.parallelism = wanted.hosts
    job.spec.completion_mode = "Indexed"
    job.spec.template.metadata.annotations = (
        None  # TensorFlow's version, of TPUs that had none of their own VMs.
    )
    pod.hostname = None  # Kubernetes names the pods by their index, and GKE the hosts by that.
    # The first is an old name of the second.
    pod.service_account, pod.service_account_name = (
        None,
        service_account,
    )
    pod.termination_grace_period_seconds = _GRACE_SECONDS
    pod.node_selector = {
        "cloud.google.com/gke-tpu-accelerator": wanted.accelerator,
        "cloud.google.com/gke-tpu-topology": wanted.topology,
    }
    if wanted.hosts > 1:
        pod.affinity = _alone_on_a_slice(job.metadata.name)
    asked = {name.replace("_", "-"): amount for name, amount in container.resources.limits.items()}
    container.resources.requests = _REQUESTS | asked
    container.resources.limits = asked | {TPU: str(wanted.chips)}
    container.ports = [k8s.V1ContainerPort(container_port=port) for port in _PORTS]
    container.volume_mounts = [
        k8s.V1VolumeMount(name=name, mount_path=path) for path, (name, _) in _VOLUMES.items()
    ]
    pod.volumes = [
        k8s.V1Volume(name=name, empty_dir=k8s.V1EmptyDirVolumeSource(medium=medium))
        for name, medium in _VOLUMES.values()
    ]


def _alone_on_a_slice(job: str) -> k8s.V1Affinity:
    """All pods of a Job on one slice, which is a node pool, and no other Job's beside them:
    JobSet's exclusive topology.
    """

    def rule(*expressions: tuple[str, list[str] | None]) -> k8s.V1PodAffinityTerm:
        found = [
            k8s.V1LabelSelectorRequirement(key=_JOB, operator=how, values=jobs)
            for how, jobs in expressions
        ]
        return k8s.V1PodAffinityTerm(
            label_selector=k8s.V1LabelSelector(match_expressions=found), topology_key=_NODE_POOL
        )

    together, apart = rule(("In", [job])), rule(("Exists", None), ("NotIn", [job]))
    return k8s.V1Affinity(
        pod_affinity=k8s.V1PodAffinity(
            required_during_scheduling_ignored_during_execution=[together]
        ),
        pod_anti_affinity=k8s.V1PodAntiAffinity(
            required_during_scheduling_ignored_during_execution=[apart]
        ),
    )


class _Completing(k8s.ApiClient):
    """Completes Jobs that are sent."""

    def __init__(self, executor: Gke):
        super().__init__()
        self._wanted = slice_of(executor.requirements)
        self._service_account = executor.service_account

    def sanitize_for_serialization(self, obj: Any) -> Any:
        if isinstance(obj, k8s.V1Job):
            complete(obj, self._wanted, self._service_account)
        return super().sanitize_for_serialization(obj)


class Printing(_Completing):
    """Sends nothing: keeps the bodies of what would be sent, and answers as a cluster that has the
    service already.
    """

    def __init__(self, executor: Gke):
        super().__init__(executor)
        self.sent: list[dict[str, Any]] = []

    def request(self, method: str, url: str, *rest: Any, body: Any = None, **more: Any) -> Any:
        del url, rest, more
        if method == "POST":
            self.sent.append(json.loads(json.dumps(body)))
        return _Answer(
            body
            if method == "POST"
            else {"items": [{"metadata": {"name": "experiments"}, "spec": {}}]}
        )


class _Answer:
    status, reason = 200, "OK"

    def __init__(self, body: Any):
        self.data = json.dumps(body).encode()

    def read(self) -> bytes:
        return self.data

    def getheader(self, name: str, default: str | None = None) -> str | None:
        return "application/json" if name.lower() == "content-type" else default

    def getheaders(self) -> dict[str, str]:
        return {"Content-Type": "application/json"}


async def _launch(unit: Any, group: xm.JobGroup) -> list[kubernetes.KubernetesHandle]:
    handles = []
    for job in job_operators.collect_jobs_by_filter(
        group, lambda job: isinstance(job.executor, Gke)
    ):
        try:
            kubernetes._load_k8s_config()
        except ConfigException as error:
            raise UserError(
                f"no cluster: gcloud container clusters get-credentials CLUSTER ({error})"
            ) from None
        client = kubernetes.Client(_Completing(job.executor))
        try:
            handles.append(
                kubernetes.KubernetesHandle(jobs=client.launch(unit.get_full_job_name, [job]))
            )
        except k8s.ApiException as error:
            raise UserError(f"the cluster refused the job: {error.reason}; {error.body}") from None
    return handles


registry.register(Gke, launch=_launch, create_handle=kubernetes._create_handle)


def printed(job: xm.Job) -> dict[str, Any]:
    """The Job that the cluster would get, as XManager makes it and `complete` leaves it."""
    api = Printing(job.executor)
    kubernetes.Client(api).launch(lambda name: f"experiment_1_{name}", [job])
    return api.sent[-1]
