"""ComfyUI's server, started without a window, given the example workflows over loopback.

The loaders of a workflow are exchanged for nodes that give tiny models: real weights are not at hand. Skipped like
`test_comfyui.py`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfyui_models as models
import pytest

pytestmark = pytest.mark.skipif(bool(models.why_not()), reason=models.why_not())
FOLDER = models.ROOT / "integrations" / "comfyui"
WORKFLOWS = FOLDER / "example_workflows"
TINY = """
import sys
sys.path.insert(0, {tests!r})
import comfyui_models as models
import torch


class Tiny:
    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{}}, "optional": {{"clip": ("CLIP",), "text": ("STRING", {{}})}}}}

    CATEGORY, FUNCTION = "tiny", "make"


class Model(Tiny):
    RETURN_TYPES = ("MODEL",)

    def make(self):
        return (models.tiny_flux(guidance=True),)


class Text(Tiny):
    RETURN_TYPES = ("CONDITIONING",)

    def make(self, clip=None, text=""):
        return (models.conditioning(len(text)),)


class Clip(Tiny):
    RETURN_TYPES = ("CLIP",)

    def make(self):
        return (None,)


class Decoder:
    def decode(self, latents):
        drawn = (latents[:, :3].movedim(1, -1) / 4 + 0.5).clamp(0, 1)
        return drawn.repeat_interleave(8, 1).repeat_interleave(8, 2)


class Vae(Tiny):
    RETURN_TYPES = ("VAE",)

    def make(self):
        return (Decoder(),)


class Latent(Tiny):
    RETURN_TYPES = ("LATENT",)

    def make(self):
        return ({{"samples": torch.zeros(1, 4, 8, 8)}},)


NODE_CLASS_MAPPINGS = {{"TinyModel": Model, "TinyText": Text, "TinyClip": Clip, "TinyVae": Vae, "TinyLatent": Latent}}
"""
INSTEAD = {
    "UNETLoader": "TinyModel",
    "DualCLIPLoader": "TinyClip",
    "CLIPTextEncode": "TinyText",
    "VAELoader": "TinyVae",
    "EmptySD3LatentImage": "TinyLatent",
}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class Failed(Exception):
    """A workflow did not come to its end, and why."""


class Server:
    """A server of ComfyUI on the CPU, on a port of the loopback."""

    def __init__(self, base: Path):
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir()
        (base / "custom_nodes" / "lesa").symlink_to(FOLDER)
        (base / "custom_nodes" / "tiny.py").write_text(TINY.format(tests=str(Path(__file__).parent)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        told = ["--cpu", "--port", str(self.port), "--base-directory", str(base), "--disable-auto-launch"]
        told += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        environment = {**os.environ, "LESA_HOME": str(base / "shelf"), "PYTHONPATH": str(models.ROOT / "src")}
        self.log = open(base / "log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(Path(os.environ[models.VARIABLE]) / "main.py"), *told],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=base,
        )
        self.output = base / "output"

    def ask(self, path: str, given: Any = None) -> Any:
        data = None if given is None else json.dumps(given).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.said()
            try:
                self.ask("system_stats")
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.said())

    def said(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()[-4000:]

    def run(self, graph: dict) -> dict:
        """Post a workflow, wait for its end, and return what it gave, by node."""
        number = self.ask("prompt", {"prompt": graph})["prompt_id"]
        for _ in range(600):
            known = self.ask(f"history/{number}")
            if number in known:
                status = known[number]["status"]
                if status["status_str"] != "success":
                    raise Failed(status["messages"][-1][1].get("exception_message", str(status)))
                return known[number]["outputs"]
            time.sleep(0.5)
        raise AssertionError(self.said())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("comfyui"))
    try:
        started.wait()
        yield started
    finally:
        started.close()


def graph_of(workflow: dict, known: dict) -> dict:
    """Return a workflow as its page saves it in the form that the server takes, with tiny loaders."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        kind = INSTEAD.get(node["type"], node["type"])
        inputs = {one["name"]: sources[one["link"]] for one in node["inputs"] if one["link"] is not None}
        if kind == node["type"]:
            inputs |= widgets_of(known[kind]["input"], node["widgets_values"])
        graph[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return graph


def widgets_of(specs: dict, values: list) -> dict:
    found, rest = {}, iter(values)
    for name, spec in {**specs.get("required", {}), **specs.get("optional", {})}.items():
        if isinstance(spec[0], list) or spec[0] in WIDGETS:
            found[name] = next(rest)
            if len(spec) > 1 and spec[1].get("control_after_generate"):
                next(rest)
    assert not list(rest), f"as many values as widgets: {values}"
    return found


def workflow(name: str) -> dict:
    return json.loads((WORKFLOWS / name).read_text())


def inputs_of(graph: dict, kind: str) -> dict:
    (found,) = [one["inputs"] for one in graph.values() if one["class_type"] == kind]
    return found


def report_in(outputs: dict) -> str:
    return next(one["text"][0] for one in outputs.values() if "evaluations by" in str(one))


def test_the_accelerating_workflow(server: Server):
    graph = graph_of(workflow("accelerate.json"), server.ask("object_info"))
    report = report_in(server.run(graph))
    assert "28 evaluations by sample_euler: 11 full, 17 skipped" in report and "without training" in report
    assert list(server.output.glob("lesa_*.png"))


def test_the_calibrating_workflow_and_then_the_accelerating_one(server: Server):
    known = server.ask("object_info")
    graph = graph_of(workflow("calibrate.json"), known)
    inputs_of(graph, "LESACalibrate").update(budgets="4", runs=3, search=1, at_once=3)
    inputs_of(graph, "BasicScheduler")["steps"] = 12
    outputs = server.run(graph)
    assert any("4 full steps" in str(one.get("text")) for one in outputs.values())
    assert any(one.get("images") for one in outputs.values())

    graph = graph_of(workflow("accelerate.json"), known)
    inputs_of(graph, "KSampler")["steps"] = 12
    report = report_in(server.run(graph))
    assert "12 evaluations by sample_euler: 4 full, 8 skipped" in report and "calibrated: flux" in report


def test_a_failing_prompt_says_why_and_the_next_one_runs(server: Server):
    graph = graph_of(workflow("accelerate.json"), server.ask("object_info"))
    lesa = inputs_of(graph, "LESAAccelerate")
    lesa.update(predictor="from a folder", folder="nowhere")
    with pytest.raises(Failed, match="the folder of a predictor is needed, got 'nowhere'"):
        server.run(graph)
    lesa.update(predictor="without training", folder="", budget=14)
    assert "14 full, 14 skipped" in report_in(server.run(graph))
