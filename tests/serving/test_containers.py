"""The image and the Kubernetes manifest of launch/serve/ fit each other and the server."""

import re
import shlex

import kubernetes_validate
import pytest
import yaml

from tests.helpers import repository
from tests.helpers.http_server import call
from tests.helpers.images import assert_hashes_are_required
from tests.helpers.miniature_runs import ROOT

FOLDER = ROOT / "launch" / "serve"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
OBJECTS = {each["kind"]: each for each in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}


def _container():
  (container,) = OBJECTS["Deployment"]["spec"]["template"]["spec"]["containers"]
  return container


def _flags_of_image():
  words = [
    word
    for name in ("ENTRYPOINT", "CMD")
    for word in yaml.safe_load(re.search(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
  ]
  return words[words.index("vixml_jax.serve") + 1 :]


@pytest.mark.parametrize("kind", OBJECTS)
def test_the_manifest_follows_the_schema_of_kubernetes(kind):
  kubernetes_validate.validate(OBJECTS[kind], "1.33", strict=True)


def test_the_checker_refuses_a_wrong_manifest():
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(OBJECTS["Service"] | {"spec": {"port": 80}}, "1.33", strict=True)


def test_the_flags_of_image_and_manifest_exist():
  flags = repository.flags_of_program("vixml_jax.serve")
  for word in [*_flags_of_image(), *_container()["args"]]:
    assert re.match(r"--(\w+)=", word)[1] in flags, word


def test_probes_ask_for_paths_of_the_server_without_a_key(server):
  container = _container()
  for name, path in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/healthz")):
    asked = container[f"{name}Probe"]["httpGet"]
    assert asked == {"path": path, "port": "http"}
    assert call(server, path).status == 200
  assert re.search(r"HEALTHCHECK.*\\\n +CMD .*127\.0\.0\.1:(\d+)/healthz", DOCKERFILE)[1] == "8080"


def test_ports_selectors_and_names_agree():
  (port,) = _container()["ports"]
  assert port["containerPort"] == int(re.search(r"^EXPOSE (\d+)", DOCKERFILE, re.MULTILINE)[1])
  assert f"--port={port['containerPort']}" in _flags_of_image()
  (of_service,) = OBJECTS["Service"]["spec"]["ports"]
  assert of_service["targetPort"] == port["name"]
  deployment = OBJECTS["Deployment"]
  labels = deployment["spec"]["template"]["metadata"]["labels"]
  for selector in (
    deployment["spec"]["selector"]["matchLabels"],
    OBJECTS["Service"]["spec"]["selector"],
    OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
  ):
    assert selector == labels
  target = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
  assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
  allowed = next(word for word in _container()["args"] if word.startswith("--allowed_hosts="))
  assert OBJECTS["Service"]["metadata"]["name"] in allowed.partition("=")[2].split(",")
  assert deployment["spec"]["replicas"] == OBJECTS["HorizontalPodAutoscaler"]["spec"]["minReplicas"]


def test_the_container_has_no_rights_that_it_does_not_need():
  pod, container = OBJECTS["Deployment"]["spec"]["template"]["spec"], _container()
  assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
  assert re.search(r"^USER 1000:1000$", DOCKERFILE, re.MULTILINE)
  assert pod["securityContext"]["runAsUser"] == 1000
  mounted = {mount["name"] for mount in container["volumeMounts"]}
  assert mounted == {volume["name"] for volume in pod["volumes"]}
  assert pod["terminationGracePeriodSeconds"] > 30 + int(container["lifecycle"]["preStop"]["exec"]["command"][1])


def test_pods_share_compiled_programs_on_a_volume_and_have_a_folder_of_their_own():
  pod, container = OBJECTS["Deployment"]["spec"]["template"]["spec"], _container()
  (place,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--compile_cache=")]
  mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
  volumes = {volume["name"]: volume for volume in pod["volumes"]}
  shared = mounts[place.removeprefix("file://")]
  assert place.startswith("file:///") and not shared.get("readOnly")
  assert volumes[shared["name"]]["persistentVolumeClaim"] == {"claimName": "vixml-programs"}
  variables = {variable["name"]: variable.get("value") for variable in container["env"]}
  assert "emptyDir" in volumes[mounts[variables["XDG_CACHE_HOME"]]["name"]]
  assert "install --directory --owner=1000 --group=1000 /programs" in DOCKERFILE


def test_the_image_gets_what_its_dockerfile_copies():
  copied = {
    word
    for line in DOCKERFILE.splitlines()
    if line.startswith("COPY ") and "--from" not in line
    for word in shlex.split(line)[1:-1]
  }
  lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
  assert {line[1:] for line in lines if line[:1] == "!"} == copied
  assert all((ROOT / name).exists() for name in copied)
  assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"python:3.11.14-slim-bookworm"}
  assert_hashes_are_required(DOCKERFILE)
  (packages,) = re.findall(r"^ARG packages=(\S+)", DOCKERFILE, re.MULTILINE)
  named = re.search(r"--build-arg=packages=([\w-]+)", DOCKERFILE)[1]
  assert all((ROOT / "requirements" / f"{name}.txt").exists() for name in (packages, named))
