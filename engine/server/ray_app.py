"""The server as a Ray Serve application: `serve run engine.server.ray_app:application pair=smollm2` (the extra `ray`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from engine.engine import Engine
from engine.errors import InvalidOption
from engine.server.app import Server, ServerConfig
from engine.server.keys import read_keys
from engine.server.loop import EngineThread
from engine.sessions.session import AUTO

_OPTIONS = {
    "pair": "smollm2",
    "target": "",
    "draft": "none",
    "device": "auto",
    "store": "",
    "quality": AUTO,
    "api_key_file": "",
    "replicas": "1",
    "num_gpus": "0",
}


def application(args: dict[str, str]) -> Any:
    """A deployment of `replicas` servers, which Ray places on the machines it has.

    args: pair, or target and draft; device; store, a folder that all replicas reach, so that what one has served comes back in another; quality of
    what it keeps; api_key_file; replicas; num_gpus a replica. Ray decides who reaches the port: give keys.

    Raises:
        InvalidOption: an option of another name, a number that is none, or a quality of no store.
    """
    unknown = sorted(args.keys() - _OPTIONS)
    if unknown:
        raise InvalidOption(f"unknown option {unknown[0]!r}", f"the options are {', '.join(_OPTIONS)}")
    given = _OPTIONS | args
    if "quality" in args and not given["store"]:
        raise InvalidOption("quality only matters to a store", "add store=DIR")
    try:
        replicas, num_gpus = int(given["replicas"]), float(given["num_gpus"])
    except ValueError as error:
        raise InvalidOption("replicas and num_gpus are numbers", "give replicas=2 num_gpus=1, say") from error

    def build() -> ASGIApp:
        """In a replica's own process."""
        thread = EngineThread()
        options: dict[str, Any] = {"device": given["device"]}
        if given["store"]:
            options |= {"store": Path(given["store"]).expanduser(), "quality": given["quality"]}
        if given["target"]:
            engine = thread.call(lambda: Engine.from_pretrained(given["target"], given["draft"], **options))
        else:
            engine = thread.call(lambda: Engine.from_pair(given["pair"], **options))
        keys = read_keys(Path(given["api_key_file"]) if given["api_key_file"] else None)
        return Server(engine, ServerConfig(model=given["target"] or given["pair"], keys=keys), thread).app

    @serve.deployment(num_replicas=replicas, ray_actor_options={"num_gpus": num_gpus}, max_ongoing_requests=1024)
    @serve.ingress(build)
    class Foretold:
        pass

    deployment: Any = Foretold  # what the decorators made of the class
    return deployment.bind()
