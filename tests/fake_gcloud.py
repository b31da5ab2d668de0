"""The command gcloud of fake_cloud.py: keeps state in FAKE_CLOUD, and runs bash where it is to run ssh.

It imports little, as a test calls it dozens of times.
"""

import contextlib
import json
import os
import re
import sys


class Gcloud:
    """One call of the command."""

    def __init__(self, directory: str, argv: list[str]) -> None:
        self.directory = directory
        self.state, self.plot = read(f"{directory}/state.json"), read(f"{directory}/plot.json")
        if "--" in argv:  # what follows is for ssh
            argv = argv[: argv.index("--")]
        self.words = [word for word in argv if not word.startswith("--")]
        self.flags = dict(word[2:].partition("=")[::2] for word in argv if word.startswith("--"))

    def main(self) -> int:
        errors = self.plot.get("errors", [])
        for words, text in errors:
            if set(words) <= set(self.words):
                self.change_plot(errors=[error for error in errors if error != [words, text]])
                return error(text)
        for words, act in {
            ("compute", "tpus", "queued-resources", "describe"): self.describe_queued,
            ("compute", "tpus", "queued-resources", "create"): self.create_queued,
            ("compute", "tpus", "queued-resources", "delete"): self.delete_queued,
            ("compute", "tpus", "tpu-vm", "describe"): self.describe_node,
            ("compute", "tpus", "queued-resources", "ssh"): self.ssh_queued,
            ("compute", "tpus", "queued-resources", "scp"): self.scp_queued,
            ("compute", "instance-templates", "create"): lambda: self.make("templates"),
            ("compute", "instance-templates", "delete"): lambda: self.unmake("templates"),
            ("compute", "resource-policies", "create", "workload-policy"): lambda: self.make("policies"),
            ("compute", "resource-policies", "delete"): lambda: self.unmake("policies"),
            ("compute", "instance-groups", "managed", "create"): self.create_group,
            ("compute", "instance-groups", "managed", "resize"): self.resize_group,
            ("compute", "instance-groups", "managed", "list-instances"): self.list_group,
            ("compute", "instance-groups", "managed", "list"): self.list_groups,
            ("compute", "instance-groups", "managed", "delete"): self.delete_group,
            ("compute", "ssh"): lambda: self.ssh([self.words[-1]]),
            ("compute", "scp"): lambda: self.scp([self.words[-1].partition(":")[0]]),
            ("secrets", "versions", "access"): lambda: print(f"value-of-{self.flags['secret']}") or 0,
        }.items():
            if tuple(self.words[: len(words)]) == words:
                before = json.dumps(self.state)
                code = act()
                if json.dumps(self.state) != before:
                    replace(f"{self.directory}/state.json", self.state)
                return code
        if self.words[-1] == "list":
            return self.list_nothing()
        return error(f"Invalid choice: {self.words}", 2)

    def list_nothing(self) -> int:
        print("Listed 0 items.", file=sys.stderr)
        return 0

    def create_queued(self) -> int:
        name = self.words[-1]
        if errors := self.plot.get("create_errors"):
            self.change_plot(create_errors=errors[1:])
            return error(errors[0])
        if name in self.state["queued"]:
            return error(f"ALREADY_EXISTS: Resource '{name}' already exists")
        count = int(self.flags.get("node-count", 0))
        nodes = [f"{self.flags['node-prefix']}-{i}" for i in range(count)] or [self.flags["node-id"]]
        self.state["queued"][name] = {
            "state": "WAITING_FOR_RESOURCES",
            "waits": self.plot.get("waits", 1),
            "nodes": dict.fromkeys(nodes, "CREATING"),
            "kind": f"{self.flags['accelerator-type']},{self.flags['labels'].rpartition('slices=')[2]}",
        }
        return 0

    def describe_queued(self) -> int:
        if self.plot.get("outages", 0) > 0:
            self.change_plot(outages=self.plot["outages"] - 1)
            return error("UNAVAILABLE: the network is down")
        queued = self.state["queued"].get(self.words[-1])
        if queued is None:
            return error(f"NOT_FOUND: Resource '{self.words[-1]}' was not found")
        if queued["state"] == "WAITING_FOR_RESOURCES":
            queued["waits"] -= 1
            if queued["waits"] < 0:
                queued["state"] = "FAILED" if self.plot.get("fails") else "ACTIVE"
                queued["nodes"] = dict.fromkeys(queued["nodes"], "READY")
        if self.flags["format"] == "yaml(state)":
            print(f"state:\n  failedData:\n    error: {{message: {self.plot.get('fails')}}}")
        else:
            print(queued["state"])
        return 0

    def delete_queued(self) -> int:
        queued = self.state["queued"].pop(self.words[-1], None)
        if queued is None:
            return error("NOT_FOUND: no such resource")
        for node in queued["nodes"]:
            for worker in range(self.plot["workers"]):
                remove(self.directory, f"{node}-w-{worker}")
        return 0

    def describe_node(self) -> int:
        for queued in self.state["queued"].values():
            if node := queued["nodes"].get(self.words[-1]):
                print(f"{node},{queued['kind']}")
                return 0
        return error("NOT_FOUND: no such node")

    def workers(self, name: str) -> list[str] | None:
        """Returns the hosts that --node and --worker name; None where their slices are not there."""
        queued = self.state["queued"].get(name, {"nodes": {}})
        node, worker = self.flags["node"], self.flags["worker"]
        chosen = [state for i, state in enumerate(queued["nodes"].items()) if node in ("all", str(i))]
        if not chosen or any(state != "READY" for _, state in chosen):
            return None
        return [
            f"{name}-w-{i}"
            for name, _ in chosen
            for i in range(self.plot["workers"])
            if worker in ("all", str(i))
        ]

    def ssh_queued(self) -> int:
        hosts = self.workers(self.words[-1])
        return error("not all nodes are READY") if hosts is None else self.ssh(hosts)

    def scp_queued(self) -> int:
        hosts = self.workers(self.words[-1].partition(":")[0])
        return error("not all nodes are READY") if hosts is None else self.scp(hosts)

    def reachable(self, host: str) -> bool:
        left = self.plot.get("unreachable", {}).get(host, 0)
        if left > 0:
            self.change_plot(unreachable=self.plot["unreachable"] | {host: left - 1})
            print(f"ssh: connect to {host} port 22: Connection timed out", file=sys.stderr)
        return left <= 0

    def ssh(self, hosts: list[str]) -> int:
        sys.stdout.flush()
        pids = [self.bash(host) for host in hosts if self.reachable(host)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, 9)  # what is left of the connection's own session ends with it
        return max(codes) if len(codes) == len(hosts) else 255

    def bash(self, host: str) -> int:
        """Returns the process of a command on a host."""
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(self.home(host))
            os.execvpe("bash", ["bash", "-c", self.flags["command"]], self.environment(host))
        return pid

    def scp(self, hosts: list[str]) -> int:
        *_, source, target = self.words
        reached = [host for host in hosts if self.reachable(host)]
        with open(source, "rb") as file:
            content, mode = file.read(), os.fstat(file.fileno()).st_mode
        for host in reached:
            with open(f"{self.home(host)}/{target.partition(':')[2]}", "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
        return 0 if reached == hosts else 255

    def home(self, host: str) -> str:
        os.makedirs(f"{self.directory}/hosts/{host}", exist_ok=True)
        return f"{self.directory}/hosts/{host}"

    def environment(self, host: str) -> dict[str, str]:
        index = int(host.rpartition("-")[2])
        own = {name: value.format(index=index) for name, value in self.plot["env"].items()}
        path = f"{self.directory}/bin:/usr/local/bin:/usr/bin:/bin"
        return {"HOME": self.home(host), "FAKE_HOST": host, "PATH": path} | own

    def change_plot(self, **changes: object) -> None:
        self.plot |= changes
        replace(f"{self.directory}/plot.json", self.plot)

    def make(self, kind: str) -> int:
        if self.words[-1] in self.state[kind]:
            return error(f"The resource '{self.words[-1]}' already exists")
        self.state[kind].append(self.words[-1])
        return 0

    def unmake(self, kind: str) -> int:
        if self.words[-1] not in self.state[kind]:
            return error(f"The resource '{self.words[-1]}' was not found")
        self.state[kind].remove(self.words[-1])
        return 0

    def create_group(self) -> int:
        if self.words[-1] in self.state["groups"]:
            return error(f"The resource '{self.words[-1]}' already exists")
        self.state["groups"][self.words[-1]] = {}
        self.state.setdefault("descriptions", {})[self.words[-1]] = self.flags["description"]
        return 0

    def resize_group(self) -> int:
        group = self.words[-1]
        machines = {f"{group}-w-{i}": "STAGING" for i in range(int(self.flags["size"]))}
        self.state["groups"][group] = machines | self.state["groups"][group]
        return 0

    def list_groups(self) -> int:
        if "filter" not in self.flags:
            return self.list_nothing()
        for group in self.state["groups"]:
            if re.search(self.flags["filter"].removeprefix("name~"), group):
                print(f"{group},{self.state['descriptions'][group]}")
        return 0

    def list_group(self) -> int:
        if self.words[-1] not in self.state["groups"]:
            return error(f"The resource '{self.words[-1]}' was not found")
        machines = self.state["groups"][self.words[-1]]
        for machine, status in machines.items():
            print(f"{machine}\t{status}")
        machines |= {m: "RUNNING" for m, status in machines.items() if status == "STAGING"}
        return 0

    def delete_group(self) -> int:
        if self.words[-1] not in self.state["groups"]:
            return error(f"The resource '{self.words[-1]}' was not found")
        for machine in self.state["groups"].pop(self.words[-1]):
            remove(self.directory, machine)
        return 0


def error(text: str, code: int = 1) -> int:
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    return code


def read(path: str) -> dict:
    with open(path) as file:
        return json.load(file)


def replace(path: str, value: object) -> None:
    new = f"{path}.{os.getpid()}"
    with open(new, "w") as file:
        json.dump(value, file)
    os.replace(new, path)


def remove(directory: str, host: str) -> None:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from fake_cloud import Cloud

    Cloud(directory).remove(host)


if __name__ == "__main__":
    cloud = os.environ["FAKE_CLOUD"]
    with open(f"{cloud}/calls.txt", "a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    sys.exit(Gcloud(cloud, sys.argv[1:]).main())
