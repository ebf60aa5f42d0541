"""openchameleon on a Ray cluster: replicas of the server, as many as the requests ask for.

    cd docs/scaling_out && OPENCHAMELEON_MODEL=nano serve run ray_serve:app

It needs openchameleon[serve] and ray[serve] on every machine, and the model's folder at the same
path. What answers is the app of `openchameleon serve`, so that the API is the same.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from openchameleon.pipeline import Chameleon
from openchameleon.serve.app import create_app
from openchameleon.serve.service import Service, Settings

MODEL = os.environ.get("OPENCHAMELEON_MODEL", "nano")
N_GPUS = int(os.environ.get("OPENCHAMELEON_GPUS", "0"))  # of a replica: 0 or 1


def build() -> FastAPI:
    """The app of one replica, its model loaded: Ray sends it no request before."""
    chameleon = Chameleon.from_pretrained(MODEL)
    return create_app(Service(Settings(name=chameleon.config.name), lambda: chameleon))


@serve.deployment(
    ray_actor_options={"num_gpus": N_GPUS, "num_cpus": 1},
    max_ongoing_requests=128,  # as --max-open: more would only get 429
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 32},
    graceful_shutdown_timeout_s=40,  # answers under way end first, as with --drain
)
@serve.ingress(build)
class Replica:
    """One server in a process of its own."""

    def check_health(self) -> None:
        """Ray replaces the replica where this raises."""
        service: Service = self.app.state.service  # type: ignore[attr-defined]
        if service.worker.dead or service.failure is not None:
            raise RuntimeError("the engine cannot be restarted")


app = Replica.bind()
