"""Ray Train's trainer without the helper processes that our runs have no use for.

Beside the workers, Ray Train 2.60 starts an actor for its controller, one for data sets even when there are none, one that
frees placement groups of a dead controller, one that asks an autoscaler for nodes, and one through which workers agree on what
they report. Each imports Ray and pandas: a second of CPU or more, in every attempt, which is time that the workers wait. Here
the controller runs in the thread that fits, in a process that has imported all that already; its placement groups go when that
process goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import Result
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, state, worker_group
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError


class _NoActor:
    """In place of the actor through which workers agree on what they report to Ray Train: ours report nothing."""

    def options(self, **_: Any) -> _NoActor:
        return self

    remote = options


# For good, not for the time of a fit: threads of one process fit at once.
worker_group.SynchronizationActor = _NoActor()  # pyright: ignore[reportPrivateImportUsage]
state._shutdown_sync_actor = lambda _: None


class _WorkerGroup(WorkerGroup):
    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: ActorHandle, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As Ray's own, without the actors that workers would ask about checkpoints that they reported."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=None,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[index] for name, values in train_context_args.items()},
                )
                for index, worker in enumerate(workers)
            ]
        )


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class _LocalWorkerGroup(_WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing of their own: what a Ray of our own starts has our environment, and processes that it has started already will do."""
        return {}


class _LocalController(_Controller):
    worker_group_cls = _LocalWorkerGroup


class ClusterTrainer(DataParallelTrainer):
    """On a cluster that others use too."""

    controller: type[TrainController] = _Controller
    _looking_after: asyncio.Task[None] | None = None

    def leave(self) -> None:
        """Has `fit` return soon, whatever becomes of the workers: their cluster is lost. For another thread than that of `fit`."""
        if self._looking_after is not None:
            with contextlib.suppress(RuntimeError):  # it has returned
                self._looking_after.get_loop().call_soon_threadsafe(self._looking_after.cancel)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused = DatasetsCallback | PlacementGroupCleanerCallback
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # how an attempt ended is for us to tell
        try:
            controller = self.controller(**settings)
            asyncio.run(self._look_after_workers(controller))
            return controller.get_result()
        except RayError:
            raise
        except asyncio.CancelledError as left:
            raise ControllerError(RuntimeError("the workers were left")) from left
        except Exception as failure:  # such as what Ray Train makes of a damaged index of its own
            raise ControllerError(failure) from failure

    async def _look_after_workers(self, controller: TrainController) -> None:
        self._looking_after = asyncio.current_task()
        await controller.run()


class LocalTrainer(ClusterTrainer):
    """On a Ray of our own, which no node can be added to."""

    controller = _LocalController

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        settings["scaling_policy"] = _AsManyAsAsked(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


class _AsManyAsAsked(FixedScalingPolicy):
    """Starts the workers that were asked for, without asking an autoscaler."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass
