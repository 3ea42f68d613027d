"""As much of a W&B server as the client's uploads need, on this machine: it keeps what it is sent."""

import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """What is wrong with a server: ``lost`` hangs up, ``silent`` and ``slow`` do not answer (soon).

    Attributes:
        kind: ``lost``, ``silent``, ``slow``, ``garbage``, or an HTTP status.
        after: how many requests are answered first.
    """

    kind: str
    after: int = 0


@dataclass
class ServedRun:
    """A run as the server has it."""

    starts: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    job_type: str | None = None
    display_name: str | None = None
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)


class WandbServer(http.server.ThreadingHTTPServer):
    """Answers the client's GraphQL operations by name; see the methods named like them."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no errors of ours."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, ServedRun] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}  # by id
        self.used: list[tuple[str, str]] = []  # run, "collection:alias" of what it takes
        self.uploads: dict[str, bytes] = {}
        self.views: list[dict[str, Any]] = []
        self.unanswered: list[str] = []
        self.command: list[str] = []  # of the one sweep
        self.trials: list[dict[str, Any]] = []  # parameters of its runs that no agent has yet
        self.fault: Fault | None = None
        self.requests, self.closed = 0, threading.Event()

    def operation(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", found[1] if found else "").lower()
        answer = getattr(self, f"on_{name}", None)
        if answer is None:
            self.unanswered.append(query)
            return {}
        return answer(variables)

    def on_server_features_query(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def on_organization_core_weave_organization_id(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def on_viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def on_get_default_entity(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self.on_viewer(variables)

    def on_runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        group = json.loads(variables["filters"] or "{}").get("group")
        found = [name for name, run in self.runs.items() if group in (None, run.group)]
        edges = [{"node": self._public_run(name), "cursor": name} for name in found]
        runs = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return {"project": {"internalId": 1, "runCount": len(found), "readOnly": False, "runs": runs}}

    def on_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"internalId": 1, "run": self._public_run(variables["name"])}}

    def _public_run(self, name: str) -> dict[str, Any]:
        run, dates = self.runs[name], dict.fromkeys(("createdAt", "heartbeatAt"), "2026-01-01T00:00:00")
        found = {"projectId": 1, "state": "finished", "group": run.group, "jobType": run.job_type, "readOnly": False}
        unset = dict.fromkeys(("commit", "systemMetrics"))
        return self._bucket(name) | found | dates | unset | {"user": {"name": "me", "username": "me"}}

    def on_upsert_view2(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.views.append(json.loads(variables["spec"]) | {"name": variables["displayName"]})
        return {"upsertView": {"view": {"id": "V", "name": "nw-abc-v"}, "inserted": True}}

    def on_upsert_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.views.append(json.loads(variables["spec"]) | {"name": variables["displayName"]})
        view = {"id": "Vmlldzox", "spec": variables["spec"], "displayName": variables["displayName"]}
        return {"upsertView": {"view": view, "inserted": True}}

    def on_project_internal_id(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "P", "internalId": "1"}}

    def on_get_projects(self, _: dict[str, Any]) -> dict[str, Any]:
        project = {
            "__typename": "Project",
            "id": "P",
            "name": "kdq",
            "entityName": "me",
            "isBenchmark": False,
            "user": None,
        }
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": [{"node": project | {"createdAt": "2026-01-01T00:00:00"}}]}}

    def on_sweep_with_runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": "S", "name": variables["sweep"], "config": json.dumps({"command": self.command})}
        return {"project": {"sweep": sweep | {"runs": {"edges": []}}}}

    def on_create_agent(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "A"}}}

    def on_heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        """A trial for an agent that has none; its end where none is left."""
        commands: list[dict[str, Any]] = []
        if not json.loads(variables["runState"] or "{}"):
            commands = [{"type": "exit"}]
            if self.trials:
                args = {name: {"value": value} for name, value in self.trials.pop(0).items()}
                run = f"trial{len(self.trials)}"
                commands = [{"type": "run", "id": run, "run_id": run, "args": args, "program": "kdq"}]
        return {"agentHeartbeat": {"agent": {"id": "A"}, "commands": json.dumps(commands)}}

    def on_run_resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        bucket = None if run is None else self._bucket(variables["name"])
        return {"model": {"id": "P", "name": "kdq", "entity": {"id": "E", "name": "me"}, "bucket": bucket}}

    def on_upsert_bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        new = name not in self.runs
        run = self.runs.setdefault(name, ServedRun())
        if variables["displayName"]:
            run.starts += 1
            run.group, run.job_type = variables["groupName"], variables["jobType"]
            run.display_name = variables["displayName"]
        config = json.loads(variables["config"] or "{}")
        run.config |= {key: value["value"] for key, value in config.items() if key != "_wandb"}
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": new}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        tail = [json.dumps(run.history[line]) for line in sorted(run.history)[-1:]]
        return {
            "id": f"B{name}",
            "name": name,
            "displayName": run.display_name,
            "description": None,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "sweepName": None,
            "project": {"id": "P", "name": "kdq", "entity": {"id": "E", "name": "me"}},
            "summaryMetrics": "{}",
            "historyLineCount": len(run.history),
            "historyTail": json.dumps(tail),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": {}}),
        }

    def on_run_input_artifacts(self, variables: dict[str, Any]) -> dict[str, Any]:
        found = [self._public_artifact(id) for run, id in self.used if run == variables["run"]]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        edges = [{"node": node} for node in found]
        return {"project": {"run": {"artifacts": {"totalCount": len(found), "pageInfo": page, "edges": edges}}}}

    def on_artifact_membership_by_name(self, variables: dict[str, Any]) -> dict[str, Any]:
        collection, _, alias = variables["name"].partition(":")
        found = [
            self._public_artifact(id)
            for id, artifact in self.artifacts.items()
            if artifact["name"] == collection and alias in artifact["aliases"] and artifact["state"] == "COMMITTED"
        ]
        if not found:
            return {"project": {"artifactCollectionMembership": None}}
        membership = {"__typename": "ArtifactCollectionMembership", "id": "AM", "artifact": found[0], "versionIndex": 0}
        shared = {"createdAt": found[0]["createdAt"], "aliases": found[0]["aliases"]}
        collected = {"artifactCollection": found[0]["artifactSequence"]}
        return {"project": {"artifactCollectionMembership": membership | shared | collected}}

    def on_artifact_type(self, variables: dict[str, Any]) -> dict[str, Any]:
        collection = variables["name"].partition(":")[0]
        types = [artifact["type"] for artifact in self.artifacts.values() if artifact["name"] == collection]
        return {"project": {"artifact": {"artifactType": {"name": types[0]}} if types else None}}

    def on_use_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        asked = variables.get("input", variables)
        self.used.append((asked["runName"], asked["artifactID"]))
        return {"useArtifact": {"artifact": self._public_artifact(asked["artifactID"])}}

    def _public_artifact(self, id: str) -> dict[str, Any]:
        artifact = self.artifacts[id]
        project = {"id": "P", "internalId": "1", "name": "kdq", "entity": {"name": "me"}}
        collection = {"__typename": "ArtifactSequence", "name": artifact["name"], "project": project}
        aliases = [
            {"__typename": "ArtifactAlias", "id": alias, "alias": alias, "artifactCollection": collection}
            for alias in artifact["aliases"]
        ]
        unset = dict.fromkeys(("description", "metadata", "historyStep", "commitHash", "updatedAt"))
        return {
            "__typename": "Artifact",
            "id": id,
            "artifactSequence": collection,
            "versionIndex": 0,
            "artifactType": {"name": artifact["type"]},
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "state": artifact["state"],
            "size": 0,
            "digest": "",
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00",
            "aliases": aliases,
        } | unset

    def on_create_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [self._upload(name) for name in variables["files"]]
        return {"createRunFiles": {"runID": f"B{variables['run']}", "uploadHeaders": [], "files": files}}

    def on_create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        asked = variables["input"]
        artifact = {
            "id": f"A{len(self.artifacts)}",
            "state": "PENDING",
            "run": asked["runName"],
            "type": asked["artifactTypeName"],
            "name": asked["artifactCollectionName"],
            "aliases": [alias["alias"] for alias in asked["aliases"]],
        }
        self.artifacts[artifact["id"]] = artifact
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": {"latestArtifact": None}}}}

    def on_create_artifact_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": self._upload("manifest")}}}

    def on_commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[variables["artifactID"]]
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": ""}}}

    def on_create_artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for file in variables["input"]["artifactFiles"]:
            upload = self._upload(f"{file['artifactID']}/{file['name']}")
            node = {"storagePath": file["name"], "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}
            nodes.append({"node": {**upload, **node, "uploadHeaders": []}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _upload(self, name: str) -> dict[str, Any]:
        return {"name": name, "uploadUrl": f"{self.url}/upload/{name}", "uploadHeaders": []}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """What runs log, line by line."""
        history = (body.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], start=history["offset"]):
            self.runs[run].history[number] = json.loads(line)
        if "exitcode" in body:
            self.runs[run].exit_codes.append(body["exitcode"])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        if self._fails():
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(body)
            answer = {"data": self.server.operation(request["query"], request.get("variables") or {})}
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.server.stream(found[1], json.loads(body))
        self._send(json.dumps(answer).encode())

    def _fails(self) -> bool:
        """Whether the server's fault has answered instead."""
        fault, self.server.requests = self.server.fault, self.server.requests + 1
        if fault is None or self.server.requests <= fault.after:
            return False
        if fault.kind == "slow":
            self.server.closed.wait(2)
            return False
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault.kind == "silent":
            self.server.closed.wait()
        if fault.kind in ("lost", "silent"):
            self.close_connection = True
        elif fault.kind == "garbage":
            self._send(b"<html>hello, " + body[:1] + b"</html>")
        else:
            self._send(b'{"errors": [{"message": "refused"}]}', int(fault.kind))
        return True

    def do_PUT(self) -> None:
        if self._fails():
            return
        self.server.uploads[self.path] = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._send(b"{}")

    def do_GET(self) -> None:
        if self._fails():
            return
        self._send(b"{}")

    def _send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A running server."""
    server = WandbServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closed.set()
        server.shutdown()
        server.server_close()
