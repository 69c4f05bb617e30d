"""Ray Train's trainer without the helper processes that our runs have no use for.

Beside its controller, Ray Train 2.60 starts an actor for data sets even when there are none, one that frees placement
groups of a dead controller, and one that asks an autoscaler for nodes. Each imports Ray and pandas: 2 s of CPU or more,
which on a small machine is time that the workers wait.
"""

from __future__ import annotations

from typing import Any

from ray.train import Result
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class ClusterTrainer(DataParallelTrainer):
    """On a cluster that others use too: only the data sets, which we have none of, are left out."""

    unused: tuple[type[RayTrainCallback], ...] = (DatasetsCallback,)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, self.unused)]


class LocalTrainer(ClusterTrainer):
    """On a Ray of our own: it ends with the driver, so nothing outlives the controller, and no node can be added."""

    unused = (DatasetsCallback, PlacementGroupCleanerCallback)

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        settings["scaling_policy"] = _AsManyAsAsked(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


class _AsManyAsAsked(FixedScalingPolicy):
    """Starts the workers that were asked for, without asking an autoscaler."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass
