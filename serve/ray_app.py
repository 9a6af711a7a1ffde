"""Ray Serve: replicas of the server, each with a scheduler and a model of its own.

    serve run suture.serve.ray_app:build out=OUT rows=8 replicas=2

Arguments are serve's options; `replicas` and `gpus` (of a replica) are Ray's.
"""

from typing import TYPE_CHECKING

from suture.serve.options import parse

if TYPE_CHECKING:
    from ray.serve import Application as RayApplication

RAYS = ("out", "replicas", "gpus")


def build(arguments: dict[str, str]) -> "RayApplication":
    from ray import serve  # which is not among the requirements

    command = [arguments["out"]]
    for name, value in arguments.items():
        if name not in RAYS:
            command += [f"--{name.replace('_', '-')}", str(value)]
    options = parse(command, "ray_app")
    waiting = options.rows + options.queue + 8  # more than the queue takes, so that what is too much gets its 429 there

    def asgi():
        """In the replica: ready when the model is loaded, so that Ray sends nothing before."""
        from suture.core.third_party import let_threads_sleep

        let_threads_sleep()
        from suture.serve.loading import assemble

        application = assemble(options)
        application.worker.start()
        application.worker.wait_until_loaded()
        return application.starlette

    @serve.deployment(
        num_replicas=int(arguments.get("replicas", 1)),
        max_ongoing_requests=waiting,
        ray_actor_options={"num_gpus": float(arguments.get("gpus", 0))},
    )
    @serve.ingress(asgi)
    class Suture:
        pass

    return Suture.bind()
