"""Everything in deploy/, checked by the tools that read it."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_tokenfilter.config import FilterConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
YAML = sorted(path for path in DEPLOY.rglob("*.y*ml"))
OVERLAYS = ("base", "cuda")
MULTI_NODE = DEPLOY / "kubernetes" / "multi-node"


def tool(name):
    """A program of this environment or of the system; the test is skipped where it is absent."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built():
    """The resources of each overlay, as `kubectl apply -k` would send them."""
    kubectl = tool("kubectl")
    return {
        name: list(yaml.safe_load_all(run(kubectl, "kustomize", DEPLOY / "kubernetes" / name))) for name in OVERLAYS
    }


def valid(resource):
    validation = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    return validation.validate(resource, "1.37", strict=True)


def of_kind(resources, kind):
    return next(resource for resource in resources if resource["kind"] == kind)


def test_yaml_is_well_formed():
    rules = (
        "{extends: default, rules: {document-start: disable, line-length: {max: 200}, braces: {max-spaces-inside: 1}}}"
    )
    pytest.importorskip("yamllint", reason="yamllint is not installed")
    run(sys.executable, "-m", "yamllint", "-s", "-d", rules, *YAML)


@pytest.mark.parametrize("name", ["cpu", "cuda", "ray"])
def test_a_dockerfile_is_clean(name):
    run(tool("hadolint"), DEPLOY / "docker" / f"Dockerfile.{name}")


@pytest.mark.parametrize("over", [[], ["compose.cuda.yaml"]], ids=["cpu", "cuda"])
def test_the_compose_files_hold_together_and_listen_here_only(over):
    files = [word for name in ("compose.yaml", *over) for word in ("-f", DEPLOY / "docker" / name)]
    project = yaml.safe_load(run(tool("docker-compose"), *files, "config", GRAFANA_PASSWORD="x"))
    for service in project["services"].values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service["ports"])
        for volume in service["volumes"]:
            assert volume["type"] != "bind" or Path(volume["source"]).exists(), volume
    targets = {volume["target"] for volume in project["services"]["server"]["volumes"]}
    assert targets == {"/etc/vllm-tokenfilter/config.yaml", "/var/cache/huggingface"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubernetes_takes_every_resource(built, name):
    for resource in built[name]:
        valid(resource)
    # The check itself fails where something is wrong.
    broken = copy.deepcopy(of_kind(built[name], "Deployment"))
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(Exception, match="readinesProbe"):
        valid(broken)


@pytest.mark.parametrize("name, config", [("base", "smollm2-135m"), ("cuda", "llama-3-8b")])
def test_pods_are_configured_by_a_file_of_configs(built, name, config):
    shipped = (ROOT / "configs" / f"{config}.yaml").read_text()
    assert of_kind(built[name], "ConfigMap")["data"] == {"config.yaml": shipped}, "copy the file of configs/ anew"


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_have_probes_limits_a_cache_and_no_privileges(built, name):
    pod = of_kind(built[name], "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    assert {"cpu", "memory"} <= set(container["resources"]["requests"]) and container["resources"]["limits"]["memory"]
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    }
    assert claims == {of_kind(built[name], "PersistentVolumeClaim")["metadata"]["name"]}
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "cuda")
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 30 * 60
    # A name with the file's hash in it: another file, other pods.
    (mounted,) = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
    assert re.fullmatch(r"vllm-tokenfilter-\w{10}", mounted)
    assert of_kind(built[name], "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    budget, scaler = of_kind(built[name], "PodDisruptionBudget"), of_kind(built[name], "HorizontalPodAutoscaler")
    assert 1 == budget["spec"]["maxUnavailable"] < scaler["spec"]["minReplicas"]


def test_the_queue_that_scales_is_the_one_the_adapter_exposes(built):
    (metric,) = of_kind(built["base"], "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "4"}
    (rule,) = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert (
        metric["pods"]["metric"]["name"] == rule["name"]["as"]
        and rule["name"]["matches"] == "vllm:num_requests_waiting"
    )


def test_pods_of_many_nodes_are_pods_kubernetes_takes():
    leader_worker, service = yaml.safe_load_all((MULTI_NODE / "leaderworkerset.yaml").read_text())
    (ray,) = yaml.safe_load_all((MULTI_NODE / "rayservice.yaml").read_text())
    template = leader_worker["spec"]["leaderWorkerTemplate"]
    cluster = ray["spec"]["rayClusterConfig"]
    pods = [template["leaderTemplate"], template["workerTemplate"], cluster["headGroupSpec"]["template"]]
    pods += [group["template"] for group in cluster["workerGroupSpecs"]]
    for pod in pods:
        valid({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]})
    valid(service)
    assert service["spec"]["selector"]["role"] == template["leaderTemplate"]["metadata"]["labels"]["role"]
    for pod in pods[:2]:
        (script,) = pod["spec"]["containers"][0]["args"]
        run("sh", "-n", "-c", script)


def test_a_custom_resource_with_an_unknown_field_is_found(tmp_path):
    definition = {
        "spec": {
            "group": "x.io",
            "names": {"kind": "Thing"},
            "versions": [
                {
                    "name": "v1",
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "spec": {"type": "object", "properties": {"size": {"type": "integer"}}},
                            },
                        }
                    },
                }
            ],
        }
    }
    (tmp_path / "definition.yaml").write_text(yaml.safe_dump(definition))
    check = [
        sys.executable,
        DEPLOY / "check_custom_resources.py",
        tmp_path / "thing.yaml",
        tmp_path / "definition.yaml",
    ]
    thing = {"apiVersion": "x.io/v1", "kind": "Thing", "metadata": {"name": "a"}, "spec": {"size": 2}}
    (tmp_path / "thing.yaml").write_text(yaml.safe_dump(thing))
    assert "valid" in run(*check)
    (tmp_path / "thing.yaml").write_text(yaml.safe_dump({**thing, "spec": {"sise": 2}}))
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "'sise' was unexpected" in done.stdout


def serve_configs():
    (ray,) = yaml.safe_load_all((MULTI_NODE / "rayservice.yaml").read_text())
    return [yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text()), yaml.safe_load(ray["spec"]["serveConfigV2"])]


@pytest.mark.parametrize("config", serve_configs(), ids=["local", "kuberay"])
def test_ray_serves_a_configuration_that_exists(config):
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert f"def {name}(" in source and f"class {application['deployments'][0]['name']}:" in source
    (file,) = re.findall(r"configs/\S+", application["args"]["flags"])
    settings = yaml.safe_load((ROOT / file).read_text())
    FilterConfig.parse(settings["additional-config"]["token_filtering"])


def test_the_unit_is_one_systemd_takes(tmp_path):
    # systemd looks for the program, which is at its place on the served machine only.
    text = (DEPLOY / "vllm-tokenfilter.service").read_text()
    program = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE).group(1)
    unit = tmp_path / "vllm-tokenfilter.service"
    unit.write_text(text.replace(program, sys.executable))
    run(tool("systemd-analyze"), "verify", "--man=no", unit)


def seconds(text):
    """Of the first number after `--shutdown-timeout`."""
    return int(re.search(r"--shutdown-timeout\W+(\d+)", text)[1])


def test_answers_in_flight_have_time_before_a_server_is_killed():
    """In seconds: vLLM's own limit, then what kills it; ten are left for vLLM to end by itself."""
    unit = (DEPLOY / "vllm-tokenfilter.service").read_text()
    compose = (DEPLOY / "docker" / "compose.yaml").read_text()
    deployment = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text())
    leader_worker = next(yaml.safe_load_all((MULTI_NODE / "leaderworkerset.yaml").read_text()))
    pod, leader = (
        deployment["spec"]["template"]["spec"],
        leader_worker["spec"]["leaderWorkerTemplate"]["leaderTemplate"],
    )
    (server,) = pod["containers"]
    assert "\nKillSignal=SIGINT\n" in unit and "\nKillMode=mixed\n" in unit, "workers would end with answers in flight"
    limits = {
        "systemd": (seconds(unit), int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])),
        "compose": (
            seconds(compose),
            int(yaml.safe_load(compose)["services"]["server"]["stop_grace_period"].removesuffix("s")),
        ),
        "pod": (
            int(server["lifecycle"]["preStop"]["exec"]["command"][1]) + seconds(" ".join(server["args"])),
            pod["terminationGracePeriodSeconds"],
        ),
        "leader": (
            seconds(leader["spec"]["containers"][0]["args"][0]),
            leader["spec"]["terminationGracePeriodSeconds"],
        ),
    }
    for config in serve_configs():
        (application,) = config["applications"]
        limits[f"ray {application['args']['flags']}"] = (
            seconds(application["args"]["flags"]),
            application["deployments"][0]["graceful_shutdown_timeout_s"],
        )
    assert len(limits) == 6
    for name, (finish, kill) in limits.items():
        assert 0 < finish <= kill - 10, name
    # And what the page says of them; a pod waits first.
    page = (ROOT / "docs" / "deploy.md").read_text()
    said = [tuple(map(int, row)) for row in re.findall(r"^  \| .* \| (\d+) s \| (\d+) s ", page, re.MULTILINE)]
    assert {*said} == {*limits.values()} - {limits["pod"]} and limits["pod"] == (110, 120) and "10 s of which" in page
    assert "StartLimitIntervalSec=600\nStartLimitBurst=5\n" in unit


def test_images_and_the_unit_stop_by_an_interrupt_and_a_group_goes_as_a_whole():
    for name in ("cpu", "cuda"):
        assert "\nSTOPSIGNAL SIGINT\n" in (DEPLOY / "docker" / f"Dockerfile.{name}").read_text()
    leader_worker = next(yaml.safe_load_all((MULTI_NODE / "leaderworkerset.yaml").read_text()))
    assert leader_worker["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_a_server_that_fails_is_restarted_by_whoever_runs_it(built):
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    assert compose["services"]["server"]["restart"] == "unless-stopped"
    for name in OVERLAYS:
        pod = of_kind(built[name], "Deployment")["spec"]["template"]["spec"]
        assert pod.get("restartPolicy", "Always") == "Always"


#: Runs systemd for this test alone: its own processes, and a /run of its own that says systemd is there.
SYSTEMD = """
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/user && export XDG_RUNTIME_DIR=/run/user HOME=/root
/usr/lib/systemd/systemd --user &
for _ in $(seq 50); do [ -S /run/user/systemd/private ] && break; sleep 0.1; done
systemctl --user start vllm-tokenfilter.service
sleep 1.5
"""


@pytest.mark.parametrize("status, starts_again", [(1, True), (2, False), (0, False)])
def test_systemd_starts_the_unit_again_after_a_failure_but_not_after_a_refusal(tmp_path, status, starts_again):
    tool("systemctl")
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec"]
    if subprocess.run([*alone, "mount -t tmpfs tmpfs /run"], capture_output=True, check=False).returncode:
        pytest.skip("systemd needs namespaces of its own here, which this user may not make")
    runs = tmp_path / "runs"
    program = tmp_path / "server"
    program.write_text(f"#!/bin/sh\necho x >>{runs}\nexit {status}\n")
    program.chmod(0o755)
    text = (DEPLOY / "vllm-tokenfilter.service").read_text()
    # What has to do with the served machine; the rules of restarting stay.
    text = re.sub(r"^(User|WorkingDirectory|Environment|CacheDirectory|No|Pr).*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ExecStart=.*$", f"ExecStart={program}", text, flags=re.MULTILINE)
    text = re.sub(r"^RestartSec=.*$", "RestartSec=0.1", text, flags=re.MULTILINE)
    (tmp_path / "vllm-tokenfilter.service").write_text(text)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        [*alone, SYSTEMD], check=True, timeout=60, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}, **quiet
    )
    assert (len(runs.read_text().split()) > 1) == starts_again
