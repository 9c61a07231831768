#!/usr/bin/env python3
"""The image and docker-compose.yml, run for real: three containers come up, answer through the published
port, and answer the same after each of them was killed. And the image for a GPU, whose libraries are found.

No registry is asked: scripts/setup has made the base image, and the binary is one that is compiled
already. All runs in namespaces of its own, so that bridge, firewall rules, mounts and whatever process is
left end with the test. Exit code 77, with a line that says why: containers cannot run here.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BASE_IMAGE = ROOT / ".data/containers/debian-bookworm-slim.tar"
MODEL = ROOT / ".data/models/SmolLM2-135M-Instruct"
LIBRARIES = ROOT / ".venv/lib/python3.11/site-packages/nvidia"
GPU_LIBRARIES = ("libcublasLt.so.13", "libcudnn.so.9", "libnvrtc.so.13")
TOOLS = ROOT / ".venv/bin"
PROGRAMS = ("podman", "crun", "netavark", "catatonit", "iptables", "ip", "unshare")
SKIPPED = 77
PATIENCE_S = 90  # for one wait, of some seconds on two idle cores
COPIES_S = 240  # for a gigabyte of libraries into an image, of some 40 s
WHOLE_S = 600
PORT = 17410
SERVICES = ("kvstore", "worker", "coordinator")
UID = "10001"

# Long enough that keys are sealed; placed so that tiles and the mailbox in the shared folder are used.
PROMPT = "The grass is green. The sky is blue. The sun is yellow. " * 30
REQUEST = ["--prompt", PROMPT, "--max-tokens", "12", "--temperature", "0", "--deterministic", "--ignore-eos",
           "--placement", "resident=0.34,fetched=0.33,in-place=0.33", "--timeout", "60s", "--json"]


STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"containers: [{time.monotonic() - STARTED:5.1f}s] {text}", flush=True)


def fail(text: str) -> None:
    raise AssertionError(text)


def skip(why: str) -> None:
    print(f"SKIPPED: containers: {why}", flush=True)
    sys.exit(SKIPPED)


def run(*command: str, check: bool = True, patience: float = PATIENCE_S) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience, cwd=ROOT)
    if check and done.returncode != 0:
        fail(f"{' '.join(command)[:200]}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def await_true(what: str, condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            fail(f"{what}: not within {PATIENCE_S} s")
        time.sleep(0.2)


# ---------------------------------------------------------------- outside of the namespaces


def write_configuration(work: Path) -> dict[str, str]:
    """Podman's files: all that it keeps lies in `work`, and it asks for no more than it may have here."""
    limits = [f'"{name}={min(16384, hard)}:{min(16384, hard)}"' for name, hard in (
        ("nofile", hard_limit(resource.RLIMIT_NOFILE)), ("nproc", hard_limit(resource.RLIMIT_NPROC)))]
    containers = work / "containers.conf"
    containers.write_text(f"""[containers]
default_ulimits = [{", ".join(limits)}]
cgroups = "disabled"  # crun knows no hybrid hierarchy; memory stays in the caller's account
pids_limit = 0
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{work}/tmp"
volume_path = "{work}/volumes"
[network]
network_backend = "netavark"
network_config_dir = "{work}/networks"
""")
    storage = work / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "overlay"\nrunroot = "{work}/run"\ngraphroot = "{work}/store"\n')
    return {"CONTAINERS_CONF": str(containers), "CONTAINERS_STORAGE_CONF": str(storage)}


def hard_limit(which: int) -> int:
    hard = resource.getrlimit(which)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard


def in_namespaces(arguments: list[str]) -> int:
    """Runs this file again inside; catatonit is process 1 there and buries what it has not started."""
    if os.geteuid() != 0:
        skip("they are run as root, with namespaces of their own")
    missing = [program for program in PROGRAMS if shutil.which(program) is None
               and not Path("/usr/lib/podman", program).exists()]
    if missing or not (TOOLS / "podman-compose").exists() or not BASE_IMAGE.exists():
        skip(f"not installed: {' '.join(missing) or 'podman-compose or the base image'}; run scripts/setup")
    unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
               "--propagation", "private"]
    probe = subprocess.run([*unshare, "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        skip(f"no namespaces: {probe.stderr.strip()}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what cleans up
    work = Path(tempfile.mkdtemp(prefix="headroom-", dir="/var/tmp"))  # short: sockets lie in it
    try:
        for folder in ("tmp", "volumes", "networks", "run", "store"):
            (work / folder).mkdir()
        inner = [*unshare, "catatonit", "--", sys.executable, __file__, "--inside", str(work), *arguments]
        environment = {**os.environ, **write_configuration(work)}
        environment["PATH"] = f"{TOOLS}:{environment['PATH']}"
        with subprocess.Popen(inner, env=environment) as process:
            try:
                return process.wait(timeout=WHOLE_S)
            finally:
                process.kill()
    finally:
        deadline = time.monotonic() + 10
        while work.exists() and time.monotonic() < deadline:  # what was killed goes in its own time
            shutil.rmtree(work, ignore_errors=True)
            time.sleep(0.1)


# ---------------------------------------------------------------- inside


def build_image(binary: Path, work: Path) -> None:
    run("podman", "import", str(BASE_IMAGE), "docker.io/library/debian:bookworm-slim")
    probe = run("podman", "run", "--rm", "--network", "none", "debian:bookworm-slim", "true", check=False)
    if probe.returncode != 0:
        skip(f"podman starts none here: {probe.stderr.strip()}")
    say("the base image is imported and starts")
    compiled = work / "build"
    compiled.mkdir()
    run("strip", "-o", str(compiled / "headroom"), str(binary))
    run("podman", "build", "--network=host", "--format=docker", "--pull=never", "--layers=false",
        f"--build-context=build={compiled}", "--file=deploy/Dockerfile", "--tag=headroom", ".")
    say(f"the image is built: {megabytes('headroom')} MB, its base included")


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def megabytes(image: str) -> int:
    return round(int(run("podman", "image", "inspect", "--format", "{{.Size}}", image).stdout) / 1e6)


def check_gpu_image(work: Path) -> None:
    """The dynamic linker finds there what a worker opens on a GPU, by name, and in the other image it does not."""
    tools = work / "tools"
    missing = [library for library in GPU_LIBRARIES if not list(LIBRARIES.glob(f"*/lib/{library}"))]
    if missing:
        print(f"SKIPPED: containers: the image for a GPU: {' '.join(missing)} not in .venv", flush=True)  # goes on
        return
    shutil.copytree(LIBRARIES, tools / "src" / LIBRARIES.relative_to(ROOT), copy_function=link_or_copy,
                    ignore=lambda folder, names: set(names) - {"lib"} if Path(folder).parent == LIBRARIES else ())
    run("podman", "build", "--network=host", "--format=docker", "--pull=never", "--layers=false",
        f"--build-context=build={work / 'build'}", f"--build-context=tools={tools}", "--target=gpu",
        "--file=deploy/Dockerfile", "--tag=headroom-gpu", ".", patience=COPIES_S)
    for image, expected in (("headroom", len(GPU_LIBRARIES)), ("headroom-gpu", 0)):
        said = run("podman", "run", "--rm", "--network=none", "--cap-drop=ALL", "--read-only",
                   f"--env=LD_PRELOAD={' '.join(GPU_LIBRARIES)}", image, "--help").stderr
        if said.count("cannot be preloaded") != expected:
            fail(f"{image}: expected {expected} of {GPU_LIBRARIES} to be missing: {said}")
    say(f"an image for a GPU: {megabytes('headroom-gpu')} MB, its libraries are found")
    run("podman", "image", "rm", "headroom-gpu")


def compose(*command: str) -> None:
    run("podman-compose", "--file", "docker-compose.yml", *command)


def inspect(service: str, field: str) -> str:
    shown = run("podman", "inspect", "--format", f"{{{{.State.{field}}}}}", f"headroom_{service}_1").stdout
    return shown.strip()


def is_healthy(service: str) -> bool:
    """What a service manager would ask by itself: the image's HEALTHCHECK."""
    return run("podman", "healthcheck", "run", f"headroom_{service}_1", check=False).returncode == 0


def await_healthy() -> None:
    for service in SERVICES:
        await_true(f"{service} is healthy", lambda: is_healthy(service))


def generate(binary: Path) -> dict:
    answer = run(str(binary), "generate", "--server", f"127.0.0.1:{PORT}", *REQUEST)
    return json.loads(answer.stdout)


def check_confinement(service: str) -> None:
    """Of the process that runs, not of what was asked for."""
    pid = inspect(service, "Pid")
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {"uids": set(status["Uid"].split()), "capabilities": int(status["CapBnd"], 16),
             "no new privileges": status["NoNewPrivs"].strip()}
    wanted = {"uids": {UID}, "capabilities": 0, "no new privileges": "1"}
    if found != wanted:
        fail(f"{service}: {found}, expected {wanted}")
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    if not all("ro" in mount[5].split(",") for mount in mounts if mount[4] == "/"):
        fail(f"{service} may write to its root")


def kill_and_recover(service: str) -> None:
    before = inspect(service, "Pid")
    killed_at = time.monotonic()
    os.kill(int(before), 9)
    await_true(f"{service} runs again", lambda: inspect(service, "Pid") not in ("0", before))
    await_healthy()
    say(f"{service} was killed and is healthy again after {time.monotonic() - killed_at:.1f} s")


def check_nothing_is_left() -> None:
    for kind, command in (("containers", ["ps", "--all"]), ("pods", ["pod", "ps"]),
                          ("volumes", ["volume", "ls"])):
        left = run("podman", *command, "--quiet").stdout.split()
        if left:
            fail(f"down leaves {kind}: {left}")
    networks = run("podman", "network", "ls", "--format", "{{.Name}}").stdout.split()
    if networks != ["podman"]:
        fail(f"down leaves networks: {networks}")
    await_true("no process of the services is left", lambda: not processes_of("headroom"))


def processes_of(program: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == program:
                found.append(int(folder.name))
        except OSError:
            pass  # it has ended
    return found


def scenario(binary: Path) -> None:
    compose("up", "--detach", "--no-build")
    say("compose up")
    await_healthy()
    say("all three are healthy")
    for service in SERVICES:
        check_confinement(service)
    first = generate(binary)
    ids = first["token_ids"]
    lanes = {lane: what["bytes"] for lane, what in first["placement"]["lanes"].items()}
    say(f"answered {first['text']!r}; bytes of lanes in decode: {lanes}")
    if len(ids) != 12 or len(lanes) != 3 or not all(lanes.values()):
        fail("expected 12 tokens, and keys from all three lanes")
    for service in SERVICES:
        kill_and_recover(service)
        again = generate(binary)["token_ids"]
        if again != ids:
            fail(f"after {service} was killed the answer is {again}, before it was {ids}")
    compose("down", "--volumes")
    check_nothing_is_left()
    say("compose down; nothing is left")


def inside(binary: Path, work: Path) -> int:
    # crun takes the hybrid hierarchy for what it is not unless this is out of sight; only here.
    if os.path.ismount("/sys/fs/cgroup/unified"):
        run("umount", "/sys/fs/cgroup/unified")
    run("ip", "link", "set", "lo", "up")
    os.environ.update(HEADROOM_MODEL_DIR=str(MODEL), HEADROOM_PORT=str(PORT), HEADROOM_GPU_MEMORY="600MiB",
                      HEADROOM_HOST_MEMORY="128MiB")
    build_image(binary, work)
    check_gpu_image(work)
    try:
        scenario(binary)
    except BaseException:
        for service in SERVICES:
            print(f"---- log of {service}", flush=True)
            subprocess.run(["podman", "logs", "--tail", "30", f"headroom_{service}_1"])
        raise
    finally:
        # Frees what is mounted; processes and networks end with the namespaces.
        subprocess.run(["podman", "pod", "rm", "--force", "--all", "--time", "0"], capture_output=True)
        subprocess.run(["podman", "rm", "--force", "--all", "--time", "0"], capture_output=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", type=Path, required=True, help="headroom, compiled")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is None:
        return in_namespaces(sys.argv[1:])
    return inside(arguments.binary.resolve(), arguments.inside)


if __name__ == "__main__":
    sys.exit(main())
